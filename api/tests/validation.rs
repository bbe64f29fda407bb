//! Objects that are accepted or refused, by the rules of the CRDs or by the code that parses the
//! objects, with the messages.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use expect_test::expect_file;
use kube_cel::Validator;
use margay_api::problem::Refusal;
use margay_api::{crds, v3};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Rows of `data/validation.txt`: a sign, kind, name and specification. The sign shows whether the
/// object is accepted.
#[test]
fn what_is_accepted_and_what_is_refused() {
    let schemas = schemas();
    let mut shown = String::new();
    for row in include_str!("data/validation.txt")
        .lines()
        .filter(|row| row.starts_with(['+', '-']))
    {
        let [sign, kind, name, spec] = row.splitn(4, ' ').collect::<Vec<_>>()[..] else {
            panic!("{row}")
        };
        let spec: Value =
            serde_yaml_ng::from_str(spec).unwrap_or_else(|error| panic!("{error}\n{row}"));
        let object = json!({
            "apiVersion": "projectcalico.org/v3", "kind": kind,
            "metadata": { "name": name, "namespace": "ns" }, "spec": spec,
        });
        let on_admission = match Validator::new().validate(&schemas[kind], &object, None) {
            Ok(()) => vec![],
            Err(errors) => errors
                .into_vec()
                .iter()
                .map(|error| format!("definition: {error}"))
                .collect(),
        };
        let when_read: Vec<String> = read(kind, &object)
            .iter()
            .map(|problem| format!("code: {problem}"))
            .collect();
        let problems = [on_admission, when_read].concat();
        assert_eq!(problems.is_empty(), sign == "+", "{row}\n{problems:#?}");
        if !problems.is_empty() {
            shown += &format!("{kind} {name} {}\n", row.splitn(4, ' ').nth(3).unwrap());
            problems
                .iter()
                .for_each(|problem| shown += &format!("    {problem}\n"));
        }
    }
    expect_file!["data/validation.expect"].assert_eq(&shown);
}

/// The schemas as the API server gets them, by kind.
fn schemas() -> BTreeMap<String, Value> {
    let schema =
        |definition: &Value| definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
    crds::all()
        .iter()
        .map(|definition| serde_json::to_value(definition).unwrap())
        .map(|definition| {
            (
                definition["spec"]["names"]["kind"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
                schema(&definition),
            )
        })
        .collect()
}

/// Problems that the code that parses objects of the kind reports.
fn read(kind: &str, object: &Value) -> Vec<String> {
    match kind {
        "NetworkPolicy" => problems(object, v3::parse::policy::network_policy),
        "GlobalNetworkPolicy" => problems(object, v3::parse::policy::global_network_policy),
        "StagedNetworkPolicy" => problems(object, v3::parse::staged::staged_network_policy),
        "StagedGlobalNetworkPolicy" => {
            problems(object, v3::parse::staged::staged_global_network_policy)
        }
        "StagedKubernetesNetworkPolicy" => {
            problems(object, v3::parse::staged::staged_kubernetes_network_policy)
        }
        "Tier" => problems(object, v3::parse::tier::tier),
        "NetworkSet" => problems(object, v3::parse::netset::network_set),
        "GlobalNetworkSet" => problems(object, v3::parse::netset::global_network_set),
        "IPPool" => problems(object, v3::parse::pool::pool),
        "FelixConfiguration" => problems(object, v3::parse::felix::overrides),
        "KubeControllersConfiguration" => problems(object, v3::parse::controllers::host_endpoints),
        "HostEndpoint" => problems(object, v3::parse::host::host_endpoint),
        other => panic!("no reader of {other}"),
    }
}

fn problems<K: DeserializeOwned, T>(
    object: &Value,
    parse: fn(&K) -> Result<T, Refusal<T>>,
) -> Vec<String> {
    match serde_json::from_value(object.clone()).map(|object| parse(&object)) {
        Ok(Ok(_)) => vec![],
        Ok(Err(refusal)) => refusal.problems.iter().map(ToString::to_string).collect(),
        Err(error) => vec![error.to_string()],
    }
}
