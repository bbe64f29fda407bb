//! The control plane: store, API server, controllers and scheduler, all in one network namespace.

use std::path::Path;
use std::process::Command;

use super::layout::{API_SERVICE, Layout};
use super::pki::{Pki, Subject, apiserver_names};

use anyhow::Result;

/// Processes of the control plane in the order in which they start.
pub const ROLES: [&str; 4] = ["etcd", "apiserver", "controller-manager", "scheduler"];

/// Client certificates that are used from inside the cluster: file, user, group.
const CLIENTS: [(&str, &str, Option<&str>); 3] = [
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("proxy", "system:kube-proxy", None),
];

/// Writes every certificate and kubeconfig of the control plane into `state`. `port` leads to the
/// API server from the machine, where the administrator is.
pub fn credentials(pki: &Pki, layout: &Layout, state: &Path, port: u16) -> Result<()> {
    let names = apiserver_names(layout.control_plane().address, API_SERVICE);
    pki.leaf(
        Subject {
            file: "apiserver",
            name: "kube-apiserver",
            group: None,
        },
        &names,
    )?;
    let masters = Some("system:masters");
    pki.leaf(
        Subject {
            file: "kubelet-client",
            name: "kube-apiserver-kubelet-client",
            group: masters,
        },
        &[],
    )?;
    let admin = Subject {
        file: "admin",
        name: "admin",
        group: masters,
    };
    pki.client(
        admin,
        &[],
        &format!("https://127.0.0.1:{port}"),
        &state.join("admin.kubeconfig"),
    )?;
    for (file, name, group) in CLIENTS {
        let out = state.join(format!("{file}.kubeconfig"));
        pki.client(Subject { file, name, group }, &[], &layout.server(), &out)?;
    }
    Ok(())
}

/// The command of one of [`ROLES`].
pub fn command(role: &str, layout: &Layout, kube_bin: &Path, state: &Path, audit: bool) -> Command {
    let pki = |file: &str| state.join("pki").join(file).display().to_string();
    let config = |file: &str| state.join(file).display().to_string();
    let (program, flags) = match role {
        "etcd" => ("etcd", etcd(&state.join("etcd"))),
        "apiserver" => ("kube-apiserver", apiserver(layout, &pki, state, audit)),
        "controller-manager" => (
            "kube-controller-manager",
            vec![
                format!("--kubeconfig={}", config("controller-manager.kubeconfig")),
                format!("--root-ca-file={}", pki("ca.crt")),
                format!("--service-account-private-key-file={}", pki("sa.key")),
                format!("--cluster-signing-cert-file={}", pki("ca.crt")),
                format!("--cluster-signing-key-file={}", pki("ca.key")),
                "--use-service-account-credentials".into(),
                "--leader-elect=false".into(),
                // All controllers start at once here; at the usual rate of 20 requests that takes
                // eight seconds.
                "--kube-api-qps=200".into(),
                "--kube-api-burst=400".into(),
                // The least that a node's heartbeat of five seconds allows: a dead node shows
                // within a test's patience.
                "--node-monitor-grace-period=16s".into(),
            ],
        ),
        _ => (
            "kube-scheduler",
            vec![
                format!("--kubeconfig={}", config("scheduler.kubeconfig")),
                "--leader-elect=false".into(),
            ],
        ),
    };
    let mut command = Command::new(kube_bin.join(program));
    command.args(flags).current_dir(state);
    command
}

fn etcd(data: &Path) -> Vec<String> {
    let (client, peer) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
    vec![
        format!("--data-dir={}", data.display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        // The data is thrown away with the cluster; waiting for the disk would only slow every
        // write down.
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ]
}

fn apiserver(
    layout: &Layout,
    pki: &dyn Fn(&str) -> String,
    state: &Path,
    audit: bool,
) -> Vec<String> {
    let mut flags = vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--advertise-address={}", layout.control_plane().address),
        "--authorization-mode=Node,RBAC".into(),
        "--allow-privileged".into(),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--service-cluster-ip-range={}", layout.service_cidrs()),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("kubelet-client.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        // There is no DNS in which a node's name could be looked up.
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--requestheader-client-ca-file={}", pki("front.crt")),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
    ];
    if audit {
        flags.push(format!(
            "--audit-policy-file={}",
            audit_policy(state).display()
        ));
        flags.push(format!(
            "--audit-log-path={}",
            state.join("logs/audit.log").display()
        ));
    }
    flags
}

/// The audit policy file: all requests, without bodies.
pub fn audit_policy(state: &Path) -> std::path::PathBuf {
    state.join("audit.json")
}

/// The content of [`audit_policy`].
pub const AUDIT_POLICY: &str = r#"{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [{"level": "Metadata"}]}"#;
