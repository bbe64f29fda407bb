//! Admission on a real API server: what it refuses and what it fills in. CRDs, defaults and
//! protections are data of ours that only an API server can run.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::Cluster;

/// Namespace of the objects of these cases.
const NAMESPACE: &str = "admission";
/// User with a tenant's rights in that namespace.
const TENANT: [&str; 2] = ["--as", "tenant"];

/// Runs every case in a namespace of its own, which is deleted at the end.
pub fn check(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["create", "namespace", NAMESPACE])?;
    let binding = [
        "create",
        "rolebinding",
        "tenant",
        "-n",
        NAMESPACE,
        "--clusterrole",
        "edit",
        "--user",
        "tenant",
    ];
    cluster.kubectl(&binding)?;
    let checked = addresses_of_pods(cluster)
        .context("addresses of pods")
        .and_then(|()| tiers(cluster).context("tiers"))
        .and_then(|()| selectors(cluster).context("selectors"))
        .and_then(|()| many_selectors(cluster).context("many selectors"))
        .and_then(|()| defaults(cluster).context("defaults of policies"));
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--wait=false"])?;
    checked
}

/// A tenant may write any annotation of its pods except those for their addresses.
fn addresses_of_pods(cluster: &Cluster) -> Result<()> {
    const RULE: &str = "are set by the network";
    create(cluster, &pod("plain", &json!({"team": "a"})), &TENANT)?;
    for name in ["podIP", "podIPs", "containerID"] {
        let annotation = format!("cni.projectcalico.org/{name}");
        let posing = pod("posing", &json!({&annotation: "10.0.0.1/32"}));
        refused(create(cluster, &posing, &TENANT), RULE)
            .with_context(|| format!("a pod that begins with {name}"))?;
        let value = format!("{annotation}=10.0.0.1/32");
        let annotate = ["annotate", "pod", "plain", "-n", NAMESPACE, &value];
        refused(cluster.kubectl(&[&annotate[..], &TENANT].concat()), RULE)
            .with_context(|| name.to_owned())?;
        // Whoever may write a pod's status may write them, as the network does.
        cluster.kubectl(&annotate)?;
        let removal = format!("{annotation}-");
        let remove = ["annotate", "pod", "plain", "-n", NAMESPACE, &removal];
        refused(cluster.kubectl(&[&remove[..], &TENANT].concat()), RULE)
            .context("the removal of it")?;
        cluster.kubectl(&remove)?;
    }
    cluster.kubectl(
        &[
            &[
                "annotate",
                "pod",
                "plain",
                "-n",
                NAMESPACE,
                "team=b",
                "--overwrite",
            ][..],
            &TENANT,
        ]
        .concat(),
    )?;
    Ok(())
}

/// Built-in tiers cannot be deleted, not even by administrators; others can.
fn tiers(cluster: &Cluster) -> Result<()> {
    for name in ["default", "kube-admin", "kube-baseline"] {
        refused(
            cluster.kubectl(&["delete", "tiers.projectcalico.org", name]),
            "built in",
        )
        .context(name)?;
        cluster.kubectl(&["get", "tiers.projectcalico.org", name])?;
    }
    create(
        cluster,
        &calico("Tier", "admission-own", &json!({"order": 17})),
        &[],
    )?;
    cluster.kubectl(&["delete", "tiers.projectcalico.org", "admission-own"])?;
    Ok(())
}

/// A kind, and a spec with a selector at the place that is tested.
type Place = (&'static str, fn(&str) -> Value);

/// A selector that the parser accepts is accepted wherever a selector may be; an invalid one is
/// refused, unless it was there before and the write changes something else.
fn selectors(cluster: &Cluster) -> Result<()> {
    let deep = format!(
        "{}has(a) || b not in {{'(', \"x\",}}{}",
        "(".repeat(100),
        ")".repeat(100)
    );
    let sound = [
        "",
        "all( )",
        "a == 'b' && !(c in {} || d starts with \"x)\")",
        "!! has(-a_./0)",
        &deep,
    ];
    let unsound = [
        "a = 'b'",
        "a == b",
        "(has(a)",
        "has(a))",
        ")has(a)(",
        "a == 'b' &&",
        "a in 'b'",
        "all",
        "\n",
    ];
    let places: [Place; 8] = [
        ("NetworkPolicy", |text| json!({"selector": text})),
        (
            "NetworkPolicy",
            |text| json!({"ingress": [{"action": "Allow", "source": {"notSelector": text}}]}),
        ),
        (
            "StagedNetworkPolicy",
            |text| json!({"serviceAccountSelector": text}),
        ),
        ("GlobalNetworkPolicy", |text| {
            json!({
                "egress": [
                    {"action": "Deny"},
                    {"action": "Allow", "destination": {"namespaceSelector": text}},
                ],
            })
        }),
        ("GlobalNetworkPolicy", |text| {
            json!({
                "ingress": [{"action": "Allow", "source": {"serviceAccounts": {"selector": text}}}],
            })
        }),
        ("FelixConfiguration", |text| json!({"nodeSelector": text})),
        (
            "IPPool",
            |text| json!({"cidr": "10.99.0.0/16", "nodeSelector": text}),
        ),
        ("KubeControllersConfiguration", |text| {
            json!({
                "controllers": {
                    "node": {
                        "hostEndpoint": {
                            "templates": [{"generateName": "t", "nodeSelector": text}],
                        },
                    },
                },
            })
        }),
    ];
    for (kind, spec) in places {
        let write = |text: &str| {
            let mut object = calico(kind, "admission-selector", &spec(text));
            if kind.ends_with("NetworkPolicy") && !kind.contains("Global") {
                object["metadata"]["namespace"] = NAMESPACE.into();
            }
            create(cluster, &object, &["--dry-run=server"])
        };
        for text in sound {
            write(text).with_context(|| format!("{kind}: {text:?}"))?;
        }
        for text in unsound {
            refused(write(text), "not a selector").with_context(|| format!("{kind}: {text:?}"))?;
        }
    }
    Ok(())
}

/// Policies with many rules are checked too, as long as most of their selectors are plain
/// comparisons.
fn many_selectors(cluster: &Cluster) -> Result<()> {
    let policy = |last: &str| {
        let rule = |number: usize| {
            let (from, to) = (
                format!("app == 'client-of-{number}'"),
                format!("app == 'server-of-{number}'"),
            );
            json!({
                "action": "Allow",
                "source": {"selector": from},
                "destination": {"selector": to},
            })
        };
        let mut rules: Vec<Value> = (0..1000).map(rule).collect();
        rules.push(json!({"action": "Allow", "source": {"selector": last}}));
        calico(
            "GlobalNetworkPolicy",
            "admission-many",
            &json!({"ingress": rules}),
        )
    };
    create(cluster, &policy("has(a)"), &["--dry-run=server"])?;
    refused(
        create(cluster, &policy("has(a"), &["--dry-run=server"]),
        "not a selector",
    )
}

/// Types, tier and label are filled in where a policy has none, and kept where it has them.
fn defaults(cluster: &Cluster) -> Result<()> {
    let rules = json!([{"action": "Allow"}]);
    let cases = [
        ("none", json!({}), json!(["Ingress"]), "default"),
        (
            "out",
            json!({"egress": rules}),
            json!(["Egress"]),
            "default",
        ),
        (
            "both",
            json!({"egress": rules, "ingress": rules}),
            json!(["Ingress", "Egress"]),
            "default",
        ),
        (
            "explicit",
            json!({"ingress": rules, "types": ["Egress"], "tier": "kube-admin"}),
            json!(["Egress"]),
            "kube-admin",
        ),
    ];
    for (name, spec, types, tier) in cases {
        let mut policy = calico("NetworkPolicy", name, &spec);
        policy["metadata"]["namespace"] = NAMESPACE.into();
        create(cluster, &policy, &[])?;
        let text = cluster.kubectl(&[
            "get",
            "networkpolicies.projectcalico.org",
            name,
            "-n",
            NAMESPACE,
            "-o",
            "json",
        ])?;
        let stored: Value = serde_json::from_str(&text)?;
        ensure!(
            stored["spec"]["types"] == types && stored["spec"]["tier"] == tier,
            "{name}: {}",
            stored["spec"]
        );
        let label = &stored["metadata"]["labels"]["projectcalico.org/tier"];
        ensure!(label == tier, "{name}: the label of its tier is {label}");
    }
    Ok(())
}

fn calico(kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "projectcalico.org/v3",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    })
}

/// A pod that no node runs: only the object matters.
fn pod(name: &str, annotations: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": NAMESPACE, "name": name, "annotations": annotations},
        "spec": {
            "nodeSelector": {"admission": "nowhere"},
            "containers": [{"name": "c", "image": crate::probe::IMAGE}],
        },
    })
}

fn create(cluster: &Cluster, object: &Value, arguments: &[&str]) -> Result<String> {
    let path = cluster.folder().join("admission.json");
    std::fs::write(&path, object.to_string())?;
    cluster.kubectl(
        &[
            &["create", "-f", &path.display().to_string()][..],
            arguments,
        ]
        .concat(),
    )
}

/// Fails unless the API server has refused, for this reason.
fn refused(outcome: Result<String>, reason: &str) -> Result<()> {
    let message = match outcome {
        Ok(message) => anyhow::bail!("it is accepted: {message}"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(
        message.contains(reason),
        "it is refused, but not for {reason:?}: {message}"
    );
    Ok(())
}
