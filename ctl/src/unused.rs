//! Fields and objects without effect, with their meaning.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::fields::{self, Ignored};
use margay_api::{crds, storage};
use serde_json::Value;

/// Groups whose kinds Margay serves, or would have to.
const GROUPS: [&str; 2] = ["projectcalico.org", "operator.tigera.io"];

/// Schemas of the kinds that are served.
pub struct Schemas(BTreeMap<(String, String), Value>);

impl Default for Schemas {
    fn default() -> Self {
        let schemas = crds::all().into_iter().filter_map(|definition| {
            let names = (definition.spec.group, definition.spec.names.kind);
            let schema = definition
                .spec
                .versions
                .into_iter()
                .next()?
                .schema?
                .open_api_v3_schema?;
            let mut schema = serde_json::to_value(schema).ok()?;
            Some((names, schema["properties"]["spec"].take()))
        });
        Self(schemas.collect())
    }
}

impl Schemas {
    /// Adds what an object of these kinds says without any effect. Lists are not looked into.
    pub fn find_ignored(&self, object: &Value, found: &mut BTreeSet<Ignored>) {
        let text = |pointer: &str| {
            object
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let (group, kind) = (
            text("/apiVersion")
                .rsplit_once('/')
                .map_or("", |(group, _)| group),
            text("/kind"),
        );
        let name = match text("/metadata/namespace") {
            "" => format!("{kind} {}", text("/metadata/name")),
            namespace => format!("{kind} {namespace}/{}", text("/metadata/name")),
        };
        let spec = &object["spec"];
        if group == storage::Mode::V1.group() {
            // Fields of other versions belong there; those that do nothing are in the tables.
            let kind = storage::kind::ALL
                .iter()
                .find(|known| known.stored_kind == kind);
            if let Some(table) = kind.and_then(|kind| fields::table(kind.kind)) {
                table.find_ignored(&name, spec, found);
            }
        } else if let (Some(table), true) = (fields::table(kind), GROUPS.contains(&group)) {
            table.find_ignored(&name, spec, found);
        } else if let Some(schema) = self.0.get(&(group.to_owned(), kind.to_owned())) {
            fields::find_unknown(&name, schema, spec, found);
        } else if GROUPS.contains(&group) {
            let meaning =
                "this version does not serve the kind, so the object has no effect".to_owned();
            found.insert(Ignored {
                is_unsafe: false,
                object: name,
                field: String::new(),
                meaning,
            });
        } else if (group, kind) == ("networking.k8s.io", "NetworkPolicy") {
            found.extend(lost_fields(&name, object));
        }
    }
}

/// Fields of a Kubernetes NetworkPolicy that its type does not have: they are lost when it is read.
fn lost_fields(name: &str, object: &Value) -> Vec<Ignored> {
    let Ok(policy) = serde_json::from_value::<NetworkPolicy>(object.clone()) else {
        return Vec::new();
    };
    let mut lost = Vec::new();
    if let Ok(kept) = serde_json::to_value(policy) {
        compare("spec", &object["spec"], &kept["spec"], &mut lost);
    }
    let ignored = lost.into_iter().map(|field| Ignored {
        is_unsafe: true,
        object: name.to_owned(),
        field,
        meaning: "there is no such field, so it has no effect; kubectl explain networkpolicy.spec \
                  lists them"
            .to_owned(),
    });
    ignored.collect()
}

fn compare(path: &str, written: &Value, kept: &Value, lost: &mut Vec<String>) {
    match (written, kept) {
        (Value::Object(written), Value::Object(kept)) => {
            for (name, value) in written {
                let path = format!("{path}.{name}");
                match kept.get(name) {
                    Some(kept) => compare(&path, value, kept, lost),
                    None if value.is_null() => {}
                    None => lost.push(path),
                }
            }
        }
        (Value::Array(written), Value::Array(kept)) => {
            for (index, (written, kept)) in written.iter().zip(kept).enumerate() {
                compare(&format!("{path}[{index}]"), written, kept, lost);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_has_no_effect_is_found_by_kind() {
        let object = |api_version: &str, kind: &str, spec: Value| {
            let metadata = json!({"name": "a"});
            json!({"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec})
        };
        let cases = [
            (
                object(
                    "projectcalico.org/v3",
                    "FelixConfiguration",
                    json!({"bpfEnabled": true}),
                ),
                "FelixConfiguration a, spec.bpfEnabled is true",
            ),
            (
                object(
                    "crd.projectcalico.org/v1",
                    "FelixConfiguration",
                    json!({"bpfEnabled": true}),
                ),
                "FelixConfiguration a, spec.bpfEnabled is true",
            ),
            (
                object(
                    "projectcalico.org/v3",
                    "GlobalNetworkPolicy",
                    json!({"selektor": "all()"}),
                ),
                "GlobalNetworkPolicy a, spec.selektor is all()",
            ),
            (
                object("operator.tigera.io/v1", "Goldmane", json!({})),
                "Goldmane a: this version does not serve",
            ),
            (
                object(
                    "networking.k8s.io/v1",
                    "NetworkPolicy",
                    json!({"podSelector": {}, "ingress": [{"form": [], "from": null}]}),
                ),
                "NetworkPolicy a, spec.ingress[0].form: there is no such field",
            ),
            (
                object(
                    "networking.k8s.io/v1",
                    "NetworkPolicy",
                    json!({"podSelector": {}, "ingress": [{"ports": [{"port": "web"}]}]}),
                ),
                "",
            ),
            (
                object("projectcalico.org/v3", "Tier", json!({"order": 1})),
                "",
            ),
            (object("v1", "ConfigMap", json!({"a": 1})), ""),
        ];
        let schemas = Schemas::default();
        for (object, wanted) in cases {
            let mut found = BTreeSet::new();
            schemas.find_ignored(&object, &mut found);
            let found: Vec<String> = found.iter().map(ToString::to_string).collect();
            match wanted {
                "" => assert_eq!(found, [""; 0], "{object}"),
                wanted => {
                    assert!(
                        found.len() == 1 && found[0].starts_with(wanted),
                        "{object}: {found:?}"
                    )
                }
            }
        }
    }
}
