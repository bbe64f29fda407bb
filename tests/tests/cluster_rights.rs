//! Rights to write, on a real API server: of an agent with its own token, and of users with roles
//! on tiers. No component of ours runs here: the rules are those that the operator renders, and the
//! API server applies them.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use margay_api::storage::Mode;
use margay_tests::cluster::layout::Topology;
use margay_tests::cluster::process::wait_for;
use margay_tests::cluster::{Cluster, Options};
use margay_tests::install::checkout;
use margay_tests::rights::{self, ApiUser};
use margay_tests::suite::Suite;
use serde_json::json;

/// Namespace of the objects of these cases.
const NAMESPACE: &str = "rights";
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let cluster = match stage() {
        Ok(cluster) => cluster,
        Err(error) => {
            suite.case("a_cluster_with_the_rules_of_an_installation", || Err(error));
            return suite.finish();
        }
    };
    suite.case("an_agent_writes_what_is_its_own_nodes", || {
        agents(&cluster, Mode::V3)
    });
    suite.case(
        "policies_of_a_tier_are_for_those_whom_rbac_lets_write_them",
        || tiers(&cluster, Mode::V3),
    );
    suite.case("what_has_policies_of_tiers_can_be_deleted", || {
        deletion(&cluster)
    });
    suite.case("the_older_storage_is_served_by_the_same_rules", || {
        older(&cluster)
    });
    suite.case(
        "an_agent_writes_what_is_its_own_nodes_in_the_older_storage",
        || agents(&cluster, Mode::V1),
    );
    suite.case("tiers_are_guarded_in_the_older_storage", || {
        tiers(&cluster, Mode::V1)
    });
    suite.finish()
}

fn stage() -> Result<Cluster> {
    let options = Options {
        name: format!("mgy-rights-{}", std::process::id()),
        nodes: 2,
        topology: Topology::Routed,
        state: Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-rights"),
        ..Options::default()
    };
    let cluster = Cluster::up(&options, &|line| println!("{line}"))?;
    let definitions = checkout().join("deploy/crds").display().to_string();
    cluster.kubectl(&["apply", "--server-side", "-f", &definitions])?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd",
        "--all",
        "--timeout=60s",
    ])?;
    rights::apply_rules(&cluster, "default.yaml")?;
    cluster.kubectl(&["create", "namespace", NAMESPACE])?;
    let pod = |namespace: &str, name: &str, node: &str, account: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {
                "namespace": namespace,
                "name": name,
                "labels": {"a": "b"},
            },
            "spec": {"nodeName": node, "serviceAccountName": account,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{
                    "name": "c",
                    "image": "margay.test/none:1",
                    "imagePullPolicy": "Never",
                }]},
        })
    };
    wait_for(
        PATIENCE,
        || format!("the account of namespace {NAMESPACE}"),
        || {
            cluster
                .kubectl(&["get", "serviceaccount", "default", "-n", NAMESPACE])
                .is_ok()
        },
    )?;
    rights::apply(
        &cluster,
        "agent.json",
        &pod("margay-system", "agent", "n2", "margay-node"),
    )?;
    rights::apply(
        &cluster,
        "on-n1.json",
        &pod(NAMESPACE, "on-n1", "n1", "default"),
    )?;
    rights::apply(
        &cluster,
        "on-n2.json",
        &pod(NAMESPACE, "on-n2", "n2", "default"),
    )?;
    Ok(cluster)
}

fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// With a token that is bound to the agent's pod, as kubelet asks for it.
fn agents(cluster: &Cluster, mode: Mode) -> Result<()> {
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", "agent"];
    let token = cluster.kubectl(
        &[
            &["create", "token", "margay-node", "-n", "margay-system"][..],
            &bound,
        ]
        .concat(),
    )?;
    run(async {
        let agent = ApiUser::with_token(cluster, mode, token.trim()).await?;
        let administrator = ApiUser::administrator(cluster, mode).await?;
        let requests = rights::table("agent-requests.yaml")?;
        rights::ask(&requests, &agent, &administrator).await?;
        rights::ask_under_strict_affinity(&requests, &agent, &administrator)
            .await
            .context("strictAffinity")
    })
}

fn tiers(cluster: &Cluster, mode: Mode) -> Result<()> {
    run(async {
        rights::ask_of_tiers(
            &rights::table("tier-rights.yaml")?,
            cluster,
            mode,
            NAMESPACE,
        )
        .await
    })
}

/// The garbage collector and the namespace controller delete policies without any rights on tiers.
fn deletion(cluster: &Cluster) -> Result<()> {
    let policy = |namespace: &str, owner: serde_json::Value| {
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
            "metadata": {"namespace": namespace, "name": "team.kept", "ownerReferences": owner},
            "spec": {"tier": "team", "selector": "all()"},
        })
    };
    cluster.kubectl(&["create", "namespace", "ends"])?;
    rights::apply(cluster, "ends.json", &policy("ends", json!([])))?;
    cluster.kubectl(&["create", "configmap", "owner", "-n", NAMESPACE])?;
    let uid = cluster.kubectl(&[
        "get",
        "configmap",
        "owner",
        "-n",
        NAMESPACE,
        "-o",
        "jsonpath={.metadata.uid}",
    ])?;
    let owner =
        json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid.trim()}]);
    rights::apply(cluster, "owned.json", &policy(NAMESPACE, owner))?;
    cluster.kubectl(&["delete", "configmap", "owner", "-n", NAMESPACE])?;
    cluster
        .kubectl(&["delete", "namespace", "ends", "--timeout=60s"])
        .context("a namespace with policies of a tier")?;
    let gone = || {
        let left = cluster.kubectl(&[
            "get",
            "networkpolicies.projectcalico.org",
            "-n",
            NAMESPACE,
            "-o",
            "name",
        ]);
        left.is_ok_and(|left| !left.contains("team.kept"))
    };
    wait_for(
        PATIENCE,
        || "the policy whose owner is gone to be collected".into(),
        gone,
    )
}

fn older(cluster: &Cluster) -> Result<()> {
    let definitions = checkout()
        .join("tests/data/calico-v1/crds.yaml")
        .display()
        .to_string();
    cluster.kubectl(&[
        "apply",
        "--server-side",
        "--force-conflicts",
        "-f",
        &definitions,
    ])?;
    let later = checkout().join("deploy/crds-v1");
    ensure!(later.exists(), "{}", later.display());
    cluster.kubectl(&[
        "apply",
        "--server-side",
        "--force-conflicts",
        "-f",
        &later.display().to_string(),
    ])?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd",
        "--all",
        "--timeout=60s",
    ])?;
    rights::apply_rules(cluster, "storage-v1.yaml")
}
