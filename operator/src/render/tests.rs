use std::collections::BTreeMap;

use expect_test::expect_file;
use k8s_openapi::api::{admissionregistration, apps, core, policy, rbac};
use margay_api::v3;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::certs::{Authority, Pair, Stored};
use crate::defaults;
use crate::inputs::{NodeFacts, PoolFacts};
use crate::validate;

fn owner() -> Owner {
    Owner {
        name: "default".to_owned(),
        uid: "8f6d1c1e-0000-4000-8000-000000000001".to_owned(),
    }
}

fn settings() -> Settings {
    Settings {
        image: String::new(),
        version: "v0.1.0".to_owned(),
        mode: Mode::V3,
        environment: BTreeMap::from([("MARGAY_LOG".to_owned(), "info".to_owned())]),
        ..Settings::default()
    }
}

/// A cluster of three nodes with no objects of ours but the CA and typha's Service.
fn inputs() -> Inputs {
    let authority = Authority {
        current: Pair {
            certificate: "CERTIFICATE 1".to_owned(),
            key: "KEY 1".to_owned(),
        },
        next: Some(Pair {
            certificate: "CERTIFICATE 2".to_owned(),
            key: "KEY 2".to_owned(),
        }),
        previous: None,
    };
    let labels: BTreeMap<String, String> = [("kubernetes.io/os", "linux"), ("role", "control")]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
    let node = |name: &str| NodeFacts {
        name: name.to_owned(),
        usable: true,
        labels: labels.clone(),
        ..NodeFacts::default()
    };
    Inputs {
        nodes: ["n1", "n2", "n3"].map(node).to_vec(),
        pod_subnets: vec!["10.244.0.0/16".to_owned()],
        cluster_id: "5b0c1b0e-0000-4000-8000-000000000002".to_owned(),
        pools: Some(Vec::new()),
        felix: Some(Default::default()),
        tiers: Some(Default::default()),
        cluster_information: Some(None),
        mutates: true,
        typha_address: Some("10.96.0.40".to_owned()),
        certificates: Stored {
            authority: Some((authority, "1".to_owned())),
            ..Stored::default()
        },
        ..Inputs::default()
    }
}

fn completed(spec: Value, inputs: &Inputs) -> InstallationSpec {
    let given = serde_json::from_value(spec).unwrap();
    let completed = defaults::complete(&given, inputs);
    assert_eq!(validate::installation(&completed), []);
    completed
}

fn text(objects: &[Object]) -> String {
    let documents: Vec<String> = objects
        .iter()
        .map(|object| serde_yaml_ng::to_string(&object.body).unwrap())
        .collect();
    documents.join("---\n")
}

fn rendered(spec: Value, inputs: &Inputs) -> Vec<Object> {
    let spec = completed(spec, inputs);
    let mut objects = plan(&spec, inputs, &owner(), &settings()).objects;
    objects.extend(pools(&spec, inputs).objects);
    objects
}

#[test]
fn an_empty_installation_gives_the_whole_default() {
    let objects = rendered(json!({}), &inputs());
    expect_file!["../../tests/golden/default.yaml"].assert_eq(&text(&objects));
}

#[test]
fn the_older_storage_differs_in_rights_admission_and_environment() {
    let spec = completed(json!({}), &inputs());
    let settings = Settings {
        mode: Mode::V1,
        ..settings()
    };
    let plan = plan(&spec, &inputs(), &owner(), &settings);
    let differs = |object: &&Object| {
        ["ClusterRole", "ValidatingAdmissionPolicy", "Deployment"].contains(&object.key.kind.kind)
    };
    let shown: Vec<Object> = plan.objects.iter().filter(differs).cloned().collect();
    expect_file!["../../tests/golden/storage-v1.yaml"].assert_eq(&text(&shown));
    assert!(
        plan.objects
            .iter()
            .all(|object| object.key.kind.kind != "MutatingAdmissionPolicy")
    );
    let all = text(&plan.objects);
    assert_eq!(
        all.matches("value: crd.projectcalico.org/v1").count(),
        2,
        "typha and the agents have the variable"
    );
}

#[test]
fn every_override_lands_in_its_place() {
    let resources = json!({ "requests": { "cpu": "100m" } });
    let spec = json!({
        "registry": "registry.example/", "imagePath": "mirror", "imagePrefix": "x-",
        "imagePullPolicy": "Always", "imagePullSecrets": [{ "name": "pull" }],
        "controlPlaneNodeSelector": { "role": "control" },
        "cni": { "binDir": "/home/kubernetes/bin", "specVersion": "0.4.0" },
        "calicoNetwork": {
            "mtu": 1400, "hostPorts": "Disabled", "linuxPolicySetupTimeoutSeconds": 5,
            "ipPools": [
                {
                    "cidr": "10.1.0.0/16",
                    "encapsulation": "None",
                    "natOutgoing": "Disabled",
                    "blockSize": 28,
                },
                {
                    "cidr": "10.2.0.0/16",
                    "encapsulation": "VXLANCrossSubnet",
                    "nodeSelector": "zone == 'a'",
                },
            ],
        },
        "nodeUpdateStrategy": { "rollingUpdate": { "maxUnavailable": "20%" } },
        "componentResources": [{ "componentName": "Typha", "resourceRequirements": resources }],
        "typhaReplicas": { "minimum": 3 },
        "nodeMetricsPort": 9091,
        "typhaMetricsPort": 9093,
        "typhaDeployment": {
            "spec": { "template": { "spec": { "tolerations": [{ "key": "only" }] } } },
        },
        "calicoNodeDaemonSet": {
            "metadata": { "labels": { "team": "net", "app.kubernetes.io/name": "theirs" } },
            "spec": { "minReadySeconds": 3, "template": {
                "metadata": { "annotations": { "scrape": "yes" } },
                "spec": {
                    "containers": [{
                        "name": "calico-node",
                        "resources": { "limits": { "memory": "64Mi" } },
                    }],
                },
            } },
        },
    });
    let workloads: Vec<Object> = rendered(spec, &inputs())
        .into_iter()
        .filter(|object| ["Deployment", "DaemonSet", "IPPool"].contains(&object.key.kind.kind))
        .collect();
    expect_file!["../../tests/golden/overrides.yaml"].assert_eq(&text(&workloads));
}

#[test]
fn without_an_address_of_typha_agents_stay_as_they_are() {
    let inputs = Inputs {
        typha_address: None,
        ..inputs()
    };
    let plan = plan(
        &completed(json!({}), &inputs),
        &inputs,
        &owner(),
        &settings(),
    );
    let kept: Vec<String> = plan.keep.iter().map(Key::to_string).collect();
    assert_eq!(kept, ["DaemonSet margay-system/margay-node"]);
    assert!(plan.waiting[0].contains("Service margay-system/margay-typha"));
    assert!(plan.objects.iter().all(|o| o.key.kind.kind != "DaemonSet"));
    assert!(plan.objects.iter().any(|o| o.key.kind.kind == "Deployment"));
}

#[test]
fn a_new_version_reaches_typha_first() {
    let workload = |name: &str, image: &str, status: Value| {
        json!({
            "metadata": { "name": name, "generation": 2 },
            "spec": { "replicas": 2, "selector": {}, "template": {
                "spec": { "containers": [{ "name": name, "image": image }] },
            } },
            "status": status,
        })
    };
    let agents = |image: &str| {
        let status = json!({
            "currentNumberScheduled": 3, "desiredNumberScheduled": 3, "numberMisscheduled": 0,
            "numberReady": 3,
        });
        vec![serde_json::from_value(workload(NODE, image, status)).unwrap()]
    };
    let typha = |image: &str, available: i32| {
        // Two of the newest template, and one more that is terminating.
        let all = if available < 0 { 3 } else { 2 };
        let available = available.abs();
        let status = json!({
            "observedGeneration": 2, "replicas": all, "updatedReplicas": 2,
            "availableReplicas": available,
        });
        vec![serde_json::from_value(workload(TYPHA, image, status)).unwrap()]
    };
    let (old, new) = ("margay.io/margay:v0.0.9", "margay.io/margay:v0.1.0");
    let table = [
        (agents(old), typha(old, 2), true),
        (agents(old), typha(new, 0), true),
        (agents(old), typha(new, -2), true),
        // A node that is gone does not block the others.
        (agents(old), typha(new, 1), false),
        (agents(old), vec![], true),
        (agents(old), typha(new, 2), false),
        (agents(new), typha(new, 0), false),
        (agents(new), typha(old, 2), false),
        (vec![], typha(old, 2), false),
    ];
    for (index, (daemon_sets, deployments, held)) in table.into_iter().enumerate() {
        let inputs = Inputs {
            daemon_sets,
            deployments,
            ..inputs()
        };
        let spec = completed(json!({}), &inputs);
        let plan = plan(&spec, &inputs, &owner(), &settings());
        assert_eq!(plan.keep.len(), usize::from(held), "row {index}");
        assert_eq!(plan.waiting.len(), usize::from(held), "row {index}");
    }
}

#[test]
fn shared_configuration_is_neither_created_twice_nor_owned() {
    let first = rendered(json!({}), &inputs());
    let shared = ["IPPool", "FelixConfiguration", "Tier", "ClusterInformation"];
    let made: Vec<&Object> = first
        .iter()
        .filter(|object| shared.contains(&object.key.kind.kind))
        .collect();
    assert_eq!(made.len(), 6);
    for object in &made {
        assert!(
            object.body["metadata"]["ownerReferences"].is_null(),
            "{}",
            object.key
        );
    }
    let find = |kind: &str| made.iter().find(|o| o.key.kind.kind == kind).unwrap();
    let inputs = Inputs {
        pools: Some(vec![PoolFacts {
            name: "default-ipv4-ippool".to_owned(),
            spec: find("IPPool").body["spec"].clone(),
            managed: true,
            ..PoolFacts::default()
        }]),
        felix: Some([("default".to_owned(), json!({}))].into()),
        tiers: Some(
            ["default", "kube-admin", "kube-baseline"]
                .map(str::to_owned)
                .into(),
        ),
        cluster_information: Some(Some(find("ClusterInformation").body["spec"].clone())),
        ..inputs()
    };
    let again = rendered(json!({}), &inputs);
    assert!(
        again
            .iter()
            .all(|object| !shared.contains(&object.key.kind.kind))
    );
    assert_eq!(again.len(), first.len() - made.len());
}

#[test]
fn kinds_that_are_not_served_block_nothing_else() {
    let bare = Inputs {
        pools: None,
        felix: None,
        tiers: None,
        cluster_information: None,
        ..inputs()
    };
    let objects = rendered(json!({}), &bare);
    assert!(objects.iter().any(|o| o.key.kind.kind == "DaemonSet"));
}

/// Decodes into the typed form and back, which drops unknown fields.
fn survives<T: DeserializeOwned + Serialize>(object: &Object) {
    let typed: T = serde_json::from_value(object.body.clone())
        .unwrap_or_else(|error| panic!("{}: {error}", object.key));
    let back = serde_json::to_value(&typed).unwrap();
    assert_eq!(
        without_empty(&back),
        without_empty(&object.body),
        "{}",
        object.key
    );
}

/// Removes empty lists and objects and unifies 1 with 1.0, which typed forms do not distinguish.
fn without_empty(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .map(|(key, value)| (key.clone(), without_empty(value)))
                .filter(|(_, value)| !value.is_null() && *value != json!([]) && *value != json!({}))
                .collect(),
        ),
        Value::Array(list) => Value::Array(list.iter().map(without_empty).collect()),
        Value::Number(number) => json!(number.as_f64()),
        other => other.clone(),
    }
}

#[test]
fn every_field_is_one_that_kubernetes_knows() {
    let mut objects = rendered(json!({}), &inputs());
    for mode in [Mode::V1, Mode::V3] {
        objects.extend(crate::install::objects("v0.1.0", mode));
    }
    for object in &objects {
        match object.key.kind.kind {
            "Namespace" => survives::<core::v1::Namespace>(object),
            "ServiceAccount" => survives::<core::v1::ServiceAccount>(object),
            "ConfigMap" => survives::<core::v1::ConfigMap>(object),
            "Service" => survives::<core::v1::Service>(object),
            "ClusterRole" => survives::<rbac::v1::ClusterRole>(object),
            "ClusterRoleBinding" => survives::<rbac::v1::ClusterRoleBinding>(object),
            "Role" => survives::<rbac::v1::Role>(object),
            "RoleBinding" => survives::<rbac::v1::RoleBinding>(object),
            "PodDisruptionBudget" => survives::<policy::v1::PodDisruptionBudget>(object),
            "Deployment" => survives::<apps::v1::Deployment>(object),
            "DaemonSet" => survives::<apps::v1::DaemonSet>(object),
            "ValidatingAdmissionPolicy" => {
                survives::<admissionregistration::v1::ValidatingAdmissionPolicy>(object);
            }
            "MutatingAdmissionPolicy" => {
                survives::<admissionregistration::v1::MutatingAdmissionPolicy>(object)
            }
            "MutatingAdmissionPolicyBinding" => {
                survives::<admissionregistration::v1::MutatingAdmissionPolicyBinding>(object);
            }
            "ValidatingAdmissionPolicyBinding" => {
                survives::<admissionregistration::v1::ValidatingAdmissionPolicyBinding>(object);
            }
            "IPPool" => survives::<v3::pool::IPPool>(object),
            "FelixConfiguration" => survives::<v3::cluster::FelixConfiguration>(object),
            "Tier" => survives::<v3::tier::Tier>(object),
            "ClusterInformation" => survives::<v3::cluster::ClusterInformation>(object),
            other => panic!("no typed form named for {other}"),
        }
    }
}

#[test]
fn images_are_named_from_registry_path_and_prefix() {
    let table = [
        (json!({}), "margay.io/margay:v0.1.0"),
        (
            json!({"registry": "UseDefault", "imagePath": "UseDefault"}),
            "margay.io/margay:v0.1.0",
        ),
        (json!({"registry": "r.example/"}), "r.example/margay:v0.1.0"),
        (
            json!({"registry": "r.example/", "imagePath": "a/b"}),
            "r.example/a/b/margay:v0.1.0",
        ),
        (
            json!({"imagePath": "a/", "imagePrefix": "p-"}),
            "margay.io/a/p-margay:v0.1.0",
        ),
    ];
    for (spec, wanted) in table {
        let spec: InstallationSpec = serde_json::from_value(spec).unwrap();
        assert_eq!(image(&spec, &settings()), wanted);
    }
    let fixed = Settings {
        image: "local:1".to_owned(),
        ..settings()
    };
    assert_eq!(image(&InstallationSpec::default(), &fixed), "local:1");
}
