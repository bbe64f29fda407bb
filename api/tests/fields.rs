//! Every field of the policy and node kinds has its line in `data/fields.tsv`, and the line is
//! true: a served field changes the meaning of the object, one without effect does not, and a
//! refused one is named in the refusal.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use margay_api::ipam::limits::Limits;
use margay_api::problem::{Problem, Refusal};
use margay_api::{crds, v3};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const TABLE: &str = include_str!("data/fields.tsv");

const KINDS: [&str; 11] = [
    "NetworkPolicy",
    "GlobalNetworkPolicy",
    "StagedNetworkPolicy",
    "StagedGlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy",
    "Tier",
    "NetworkSet",
    "GlobalNetworkSet",
    "HostEndpoint",
    "KubeControllersConfiguration",
    "IPReservation",
];

/// A line of the table for one kind and one place.
#[derive(Debug)]
struct Line {
    kind: &'static str,
    /// As in a definition's schema, with `[]` after lists.
    field: String,
    becomes: String,
    value: String,
    /// Further fields: of the rule that the field is in, or of the spec.
    beside: Value,
    why: String,
}

/// Expands a short form of a path.
fn places(field: &str) -> Vec<String> {
    let of = |prefix: &str, sides: &[(&str, &str)]| -> Option<Vec<String>> {
        let rest = field.strip_prefix(prefix)?;
        let place = |(direction, side): &(&str, &str)| format!("spec.{direction}[].{side}{rest}");
        Some(sides.iter().map(place).collect())
    };
    let far = [("ingress", "source."), ("egress", "destination.")];
    let own = [("ingress", "destination."), ("egress", "source.")];
    let peer = [("ingress", "from[]."), ("egress", "to[].")];
    of("rule.", &[("ingress", ""), ("egress", "")])
        .or_else(|| of("side.", &[far, own].concat()))
        .or_else(|| of("far.", &far))
        .or_else(|| of("own.", &own))
        .or_else(|| of("peer.", &peer))
        .unwrap_or_else(|| vec![field.to_owned()])
}

fn lines() -> Vec<Line> {
    let mut lines = Vec::new();
    for text in TABLE.lines().filter(|line| !line.starts_with('#')) {
        let cells: Vec<&str> = text.split('\t').collect();
        let [kinds, field, becomes, value, beside, why] = cells[..] else {
            panic!("six cells: {text:?}")
        };
        for (kind, field) in kinds
            .split(',')
            .flat_map(|kind| places(field).into_iter().map(move |field| (kind, field)))
        {
            let kind = *KINDS
                .iter()
                .find(|known| **known == kind)
                .unwrap_or_else(|| panic!("{kind}: {text:?}"));
            // The side that the field is on.
            let is_on = |side: &&str| field.split(['.', '[']).any(|part| part == *side);
            let side = ["source", "from", "to"]
                .into_iter()
                .find(is_on)
                .unwrap_or("destination");
            let beside = if beside.is_empty() {
                "{}".to_owned()
            } else {
                beside.replace("SIDE", side)
            };
            let beside =
                serde_json::from_str(&beside).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            let (becomes, value, why) = (becomes.to_owned(), value.to_owned(), why.to_owned());
            lines.push(Line {
                kind,
                field,
                becomes,
                value,
                beside,
                why,
            });
        }
    }
    lines
}

/// Fields of a schema that have no fields of their own.
fn leaves(path: &str, schema: &Value, found: &mut BTreeSet<String>) {
    let properties = schema["properties"].as_object();
    for (name, property) in properties.into_iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        leaves(&path, property, found);
    }
    if schema["items"]["properties"].is_object() {
        leaves(&format!("{path}[]"), &schema["items"], found);
    } else if properties.is_none() {
        found.insert(path.to_owned());
    }
}

#[test]
fn the_table_has_every_field_once_and_no_other() {
    for kind in KINDS {
        let definition = crds::all()
            .into_iter()
            .find(|definition| definition.spec.names.kind == kind)
            .unwrap();
        let mut wanted = BTreeSet::new();
        for version in &definition.spec.versions {
            let schema = version
                .schema
                .as_ref()
                .and_then(|schema| schema.open_api_v3_schema.as_ref())
                .unwrap();
            leaves("", &serde_json::to_value(schema).unwrap(), &mut wanted);
        }
        let found: Vec<String> = lines()
            .into_iter()
            .filter(|line| line.kind == kind)
            .map(|line| line.field)
            .collect();
        let distinct: BTreeSet<String> = found.iter().cloned().collect();
        assert_eq!(distinct, wanted, "{kind}");
        assert_eq!(found.len(), distinct.len(), "{kind}: a field has two lines");
    }
}

/// Puts a value at a path; a list on the way gets one item.
fn put(at: &mut Value, path: &str, value: Value) {
    let (first, rest) = path
        .split_once('.')
        .map_or((path, None), |(first, rest)| (first, Some(rest)));
    let next = match first.strip_suffix("[]") {
        Some(list) if at[list].is_array() => &mut at[list][0],
        Some(list) => {
            at[list] = json!([{}]);
            &mut at[list][0]
        }
        None => &mut at[first],
    };
    match rest {
        Some(rest) => put(next, rest, value),
        None => *next = value,
    }
}

fn merge(into: &mut Value, from: &Value) {
    match from {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, value)| merge(&mut into[name], value)),
        other => *into = other.clone(),
    }
}

/// The object without the field, and with it.
fn objects(line: &Line) -> [Value; 2] {
    let group = "projectcalico.org/v3";
    let mut object = json!({
        "apiVersion": group,
        "kind": line.kind,
        "metadata": {"name": "a", "namespace": "red"},
        "spec": {},
    });
    if line.kind.ends_with("Set") {
        object["spec"]["nets"] = json!([]);
    }
    let rules = ["ingress", "egress"]
        .into_iter()
        .find(|direction| line.field.starts_with(&format!("spec.{direction}[]")));
    match rules {
        Some(direction) => {
            let is_kubernetes = line.kind == "StagedKubernetesNetworkPolicy";
            let mut rule = if is_kubernetes {
                json!({})
            } else {
                json!({"action": "Deny"})
            };
            merge(&mut rule, &line.beside);
            object["spec"][direction] = json!([rule]);
        }
        None => merge(&mut object["spec"], &line.beside),
    }
    let mut with = object.clone();
    put(
        &mut with,
        &line.field,
        serde_json::from_str(&line.value).unwrap_or_else(|error| panic!("{line:?}: {error}")),
    );
    [object, with]
}

/// Returns the meaning of an object, or its refused fields.
fn meaning(object: &Value) -> Result<String, Vec<String>> {
    fn of<K: DeserializeOwned, T: Debug, C>(
        object: &Value,
        parse: impl Fn(&K) -> Result<T, Refusal<C>>,
    ) -> Result<String, Vec<String>> {
        // The API server refuses objects that do not match the schema.
        let typed = serde_json::from_value(object.clone())
            .map_err(|error| vec![format!("shape: {error}")])?;
        let refused = |refusal: Refusal<C>| {
            refusal
                .problems
                .into_iter()
                .map(|problem| problem.field)
                .collect()
        };
        parse(&typed)
            .map(|meaning| format!("{meaning:?}"))
            .map_err(refused)
    }
    match object["kind"].as_str().unwrap() {
        "NetworkPolicy" => of(object, v3::parse::policy::network_policy),
        "GlobalNetworkPolicy" => of(object, v3::parse::policy::global_network_policy),
        "StagedNetworkPolicy" => of(object, v3::parse::staged::staged_network_policy),
        "StagedGlobalNetworkPolicy" => of(object, v3::parse::staged::staged_global_network_policy),
        "StagedKubernetesNetworkPolicy" => {
            of(object, v3::parse::staged::staged_kubernetes_network_policy)
        }
        "Tier" => of(object, v3::parse::tier::tier),
        "NetworkSet" => of(object, v3::parse::netset::network_set),
        "GlobalNetworkSet" => of(object, v3::parse::netset::global_network_set),
        "HostEndpoint" => of(object, v3::parse::host::host_endpoint),
        "KubeControllersConfiguration" => {
            of(object, |settings: &v3::KubeControllersConfiguration| {
                let hosts = v3::parse::controllers::host_endpoints(settings)?;
                Ok::<_, Refusal<_>>((hosts, v3::parse::controllers::leak_grace(settings)))
            })
        }
        "IPReservation" => of(object, reservation),
        other => panic!("{other} is not in KINDS"),
    }
}

/// Returns the reserved ranges; reservations are read all at once.
fn reservation(object: &v3::IPReservation) -> Result<Limits, Refusal<()>> {
    let (limits, problems) = Limits::new(
        None,
        &BTreeMap::from([("a".to_owned(), object.spec.clone())]),
        None,
    );
    let of_field = |problem: &String| Problem::new("spec.reservedCIDRs", problem.as_str(), "", "");
    let problems: Vec<Problem> = problems.iter().map(of_field).collect();
    if problems.is_empty() {
        Ok(limits)
    } else {
        Err(Refusal {
            problems,
            closed: None,
            prefers_former: false,
        })
    }
}

#[test]
fn every_field_behaves_as_its_line_states() {
    for line in lines() {
        if line.becomes == "status" {
            assert!(
                line.field.starts_with("status.") && !line.why.is_empty(),
                "{line:?}"
            );
            continue;
        }
        let [without, with] = objects(&line).map(|object| (meaning(&object), object));
        let context = format!("{line:?}\n{}\n{:?}", with.1, with.0);
        match line.becomes.as_str() {
            "served" => {
                // An incomplete service is refused with the field or without.
                assert!(with.0.is_ok(), "{context}");
                assert_ne!(without.0, with.0, "{context}");
            }
            "without effect" => {
                assert!(!line.why.is_empty() && with.0.is_ok(), "{context}");
                assert_eq!(without.0, with.0, "{context}");
            }
            "refused" => {
                let named = line.field.replace("[]", "[0]");
                let fields = with.0.expect_err(&context);
                assert!(!line.why.is_empty(), "{context}");
                // The problem may be reported for the parent of the field.
                assert!(
                    fields.iter().any(|field| named.starts_with(field.as_str())),
                    "{context}"
                );
            }
            other => panic!("{other:?} is none of served, without effect, refused, status"),
        }
    }
}
