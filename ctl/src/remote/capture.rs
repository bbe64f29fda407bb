//! `capture`: packets of a pod by its name, from the agent of its node into a file.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use margay_proto::debug::CaptureRequest;
use margay_proto::debug::capture_client::CaptureClient;

use crate::live::{self, Connection, ConnectionArgs, explained};
use crate::output::Finding;
use crate::remote::link::{self, CAPTURE_SECRET, Link};

/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Name of the pod.
    pub pod: String,
    /// File to write, which must not exist; - is standard output.
    #[arg(short, long, value_name = "FILE")]
    pub write: PathBuf,
    /// Namespace of the pod.
    #[arg(short, long, default_value = "default")]
    pub namespace: String,
    /// Seconds after which it ends, at most 600.
    #[arg(long, default_value_t = 30)]
    pub seconds: u32,
    /// Bytes of the file after which it ends, at most 268435456.
    #[arg(long, default_value_t = 16 << 20)]
    pub bytes: u64,
    /// Bytes of each packet that are kept, at most 65535.
    #[arg(long, value_name = "BYTES", default_value_t = 256)]
    pub snap_length: u32,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let written = live::block_on(capture(args))?;
    let is_output = args.write.as_os_str() == "-";
    Ok(Finding {
        text: match is_output {
            true => String::new(),
            false => format!("{written} bytes are in {}\n", args.write.display()),
        },
        holds: true,
    })
}

async fn capture(args: &Args) -> Result<u64> {
    let cluster = Connection::open(&args.connection).await?;
    let subject = format!("{}/{}", args.namespace, args.pod);
    let pods: Api<Pod> = Api::namespaced(cluster.client().clone(), &args.namespace);
    let pod = pods.get_opt(&args.pod).await.map_err(explained)?;
    let pod =
        pod.with_context(|| format!("there is no pod {subject}; -n names another namespace"))?;
    let spec = pod.spec.context("the pod has no spec")?;
    ensure!(
        spec.host_network != Some(true),
        "pod {subject} is in the network of its node and has no interface of its own"
    );
    let node = spec
        .node_name
        .with_context(|| format!("pod {subject} is on no node yet"))?;
    let link = Link::with_secret(&cluster, CAPTURE_SECRET).await?;
    let agents = link.agents().await?;
    let agent = agents
        .get(&node)
        .with_context(|| format!("no agent is on node {node}"))?;
    let mut client = CaptureClient::new(link.channel_to_agent(agent).await?);
    let request = CaptureRequest {
        namespace: args.namespace.clone(),
        name: args.pod.clone(),
        seconds: args.seconds,
        bytes: args.bytes,
        snap_length: args.snap_length,
    };
    let whom = format!("the agent of {node}");
    let mut chunks = link::answered(&whom, client.record(request).await)?;
    // Only now, so that what is refused leaves no file.
    let mut file = output(args)?;
    let mut written = 0;
    loop {
        match chunks.message().await {
            Ok(Some(chunk)) => {
                file.write_all(&chunk.pcap)
                    .context("the file cannot be written")?;
                file.flush()?;
                written += chunk.pcap.len() as u64;
            }
            Ok(None) => return Ok(written),
            Err(status) => bail!("{whom} after {written} bytes: {}", status.message()),
        }
    }
}

fn output(args: &Args) -> Result<Box<dyn Write>> {
    if args.write.as_os_str() == "-" {
        return Ok(Box::new(io::stdout()));
    }
    let shown = args.write.display();
    let file =
        File::create_new(&args.write).with_context(|| format!("{shown}: cannot be created"))?;
    Ok(Box::new(file))
}
