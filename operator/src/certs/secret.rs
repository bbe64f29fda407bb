//! Secrets of the CA and of components.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::{Authority, Leaf, Pair};
use crate::manifest::Object;
use crate::names::{CA_NAME, NAMESPACE};

/// Returns the Secret of the CA. It is in the operator's namespace and not owned by the
/// Installation, so that nodes' certificates stay valid when the Installation is recreated.
/// `version` makes the write fail if another one was faster.
pub fn authority(authority: &Authority, namespace: &str, version: Option<&String>) -> Object {
    let mut data = json!({
        "tls.crt": encoded(&authority.current.certificate),
        "tls.key": encoded(&authority.current.key),
    });
    if let Some(next) = &authority.next {
        data["next.crt"] = encoded(&next.certificate);
        data["next.key"] = encoded(&next.key);
    }
    if let Some(previous) = &authority.previous {
        data["previous.crt"] = encoded(previous);
    }
    let mut object = object(CA_NAME, namespace, data).managed();
    if let Some(version) = version {
        object.body["metadata"]["resourceVersion"] = json!(version);
    }
    object
}

/// Returns the Secret of a component.
pub fn leaf(leaf: &Leaf, pair: &Pair) -> Object {
    let data = json!({ "tls.crt": encoded(&pair.certificate), "tls.key": encoded(&pair.key) });
    object(leaf.secret, NAMESPACE, data)
}

fn object(name: &str, namespace: &str, data: Value) -> Object {
    Object::new(
        "Secret",
        json!({
            "metadata": { "name": name, "namespace": namespace },
            "type": "kubernetes.io/tls",
            "data": data,
        }),
    )
}

/// Encodes text for a Secret's `data`. (`stringData` would keep keys that are no longer applied.)
fn encoded(text: &str) -> Value {
    json!(STANDARD.encode(text))
}

/// Returns one value of a Secret; none if it is absent, empty or not UTF-8.
pub fn text(secret: &DynamicObject, key: &str) -> Option<String> {
    let encoded = secret.data["data"][key].as_str()?;
    let bytes = STANDARD.decode(encoded).ok()?;
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.is_empty())
}

/// Returns the CA that a Secret holds; none if certificate or key is missing.
pub fn authority_of(secret: &DynamicObject) -> Option<Authority> {
    let pair = |certificate: &str, key: &str| {
        Some(Pair {
            certificate: text(secret, certificate)?,
            key: text(secret, key)?,
        })
    };
    Some(Authority {
        current: pair("tls.crt", "tls.key")?,
        next: pair("next.crt", "next.key"),
        previous: text(secret, "previous.crt"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(object: &Object) -> DynamicObject {
        serde_json::from_value(object.body.clone()).unwrap()
    }

    fn whole() -> Authority {
        let pair = |name: &str| Pair {
            certificate: format!("certificate {name}"),
            key: format!("key {name}"),
        };
        Authority {
            current: pair("1"),
            next: Some(pair("2")),
            previous: Some("certificate 0".to_owned()),
        }
    }

    #[test]
    fn an_authority_comes_back_as_it_was_stored() {
        let plain = Authority {
            next: None,
            previous: None,
            ..whole()
        };
        for stored in [whole(), plain] {
            let object = authority(&stored, "margay-operator", None);
            assert_eq!(authority_of(&read(&object)), Some(stored));
            assert!(object.body["metadata"]["ownerReferences"].is_null());
        }
    }

    #[test]
    fn a_change_names_the_version_that_it_is_made_from() {
        let object = authority(&whole(), "a", Some(&"7".to_owned()));
        assert_eq!(object.body["metadata"]["resourceVersion"], "7");
    }

    #[test]
    fn half_a_secret_is_none() {
        let mut object = authority(&whole(), "a", None);
        object.body["data"]["tls.key"] = Value::Null;
        assert_eq!(authority_of(&read(&object)), None);
        object.body["data"]["tls.key"] = json!("%");
        assert_eq!(authority_of(&read(&object)), None);
        let mut object = authority(&whole(), "a", None);
        object.body["data"]["next.key"] = Value::Null;
        assert_eq!(authority_of(&read(&object)).unwrap().next, None);
    }
}
