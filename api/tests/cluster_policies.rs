//! Conversion of Kubernetes' cluster-wide policies: cases as text, with the result beside each.

#![allow(clippy::unwrap_used)]

use expect_test::expect_file;
use margay_api::k8s::cnp;
use serde_json::{Value, json};

mod support;

/// Cases in `data/cluster-policies.yaml`: one spec each, with a comment on its purpose.
#[test]
fn cluster_wide_policies() {
    let cases = include_str!("data/cluster-policies.yaml");
    let mut shown = String::new();
    for case in cases.split("\n---\n") {
        let spec: Value = serde_yaml_ng::from_str(case).unwrap();
        let policy: cnp::ClusterNetworkPolicy = serde_json::from_value(json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2",
            "kind": "ClusterNetworkPolicy",
            "metadata": { "name": "p" },
            "spec": spec,
        }))
        .unwrap_or_else(|error| panic!("every object decodes: {error}\n{case}"));
        assert_eq!(
            cnp::key(&policy).to_string(),
            "KubernetesClusterNetworkPolicy p"
        );
        let (title, _) = case.trim_start().split_once('\n').unwrap();
        shown += &format!("{title}\n{}\n", support::show(cnp::policy(&policy)));
    }
    expect_file!["data/cluster-policies.expect"].assert_eq(&shown);
}
