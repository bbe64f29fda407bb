//! Calls of the CNI plugin, made as a container runtime makes them.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::install;

/// Name of the network in every configuration here.
pub const NETWORK: &str = "k8s-pod-network";

/// Parameters of a runtime for one sandbox, for every command.
#[derive(Clone, Debug)]
pub struct Call {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`; empty: not set.
    pub netns: String,
    /// `CNI_ARGS`.
    pub arguments: String,
    /// The network configuration.
    pub config: Value,
    /// `TRACEPARENT`; empty: not set.
    pub traceparent: String,
}

/// Answer of the plugin.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Success with what it printed; null when that was nothing.
    Success(Value),
    /// The error object of the CNI specification.
    Refusal(Value),
}

impl Call {
    /// A call for a sandbox of `pod` (`namespace/name`) whose agent listens on `socket`.
    pub fn new(socket: &Path, pod: &str, container: &str, netns: &str) -> Result<Self> {
        let (namespace, name) = crate::world::split(pod)?;
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
             K8S_POD_INFRA_CONTAINER_ID={container}"
        );
        let config = json!({
            "cniVersion": "1.1.0", "name": NETWORK, "type": "margay", "ipam": {
                "type": "calico-ipam",
            },
            "margay": {"socket": socket},
        });
        Ok(Self {
            container: container.to_owned(),
            netns: netns.to_owned(),
            arguments,
            config,
            traceparent: String::new(),
        })
    }

    /// Runs the plugin.
    pub fn exec(&self, command: &str) -> Result<Answer> {
        let mut child = Command::new(install::beside("margay-cni")?)
            .env_clear()
            .envs([
                ("CNI_COMMAND", command),
                ("CNI_CONTAINERID", &self.container),
                ("CNI_NETNS", &self.netns),
                ("CNI_IFNAME", "eth0"),
                ("CNI_PATH", "/opt/cni/bin"),
                ("CNI_ARGS", &self.arguments),
            ])
            .envs((!self.traceparent.is_empty()).then_some(("TRACEPARENT", &self.traceparent)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .context("standard input")?
            .write_all(self.config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let result = match output.stdout.as_slice() {
            [] => Value::Null,
            stdout => {
                serde_json::from_slice(stdout).context("what the plugin printed is not JSON")?
            }
        };
        Ok(if output.status.success() {
            Answer::Success(result)
        } else {
            Answer::Refusal(result)
        })
    }
}

impl Answer {
    /// Output on success; a refusal is an error with the plugin's message.
    pub fn success(self) -> Result<Value> {
        match self {
            Self::Success(result) => Ok(result),
            Self::Refusal(error) => bail!("the plugin refuses: {error}"),
        }
    }

    /// Code and message of a refusal; success is an error.
    pub fn refusal(self) -> Result<(u64, String)> {
        match self {
            Self::Success(result) => bail!("the plugin should refuse, and answers {result}"),
            Self::Refusal(error) => {
                let code = error["code"]
                    .as_u64()
                    .with_context(|| format!("no code in {error}"))?;
                Ok((code, error["msg"].as_str().unwrap_or_default().to_owned()))
            }
        }
    }
}
