//! Objects of `crd.projectcalico.org/v1`: translated to the users' form, and changed without losing
//! what other writers have put there.

use kube::Error;
use kube::api::{DeleteParams, DynamicObject};
use margay_api::storage::{self, Kind};
use serde::de::Error as _;
use serde_json::Value;

/// Fields that the API server sets, which are not part of the user's object.
const BOOKKEEPING: [&str; 3] = ["managedFields", "generation", "selfLink"];

/// Replaces a stored object by the user's form; one that cannot be translated stays as it is and is
/// logged.
pub fn from_storage(kind: &Kind, object: &mut DynamicObject) {
    let seen = serde_json::to_value(&*object)
        .map_err(storage::StorageError::from)
        .and_then(|stored| {
            let mut read = storage::read(kind, stored)?;
            storage::complete(kind, &mut read.object);
            Ok(serde_json::from_value(read.object)?)
        });
    match seen {
        Ok(seen) => *object = seen,
        Err(error) => {
            let name = object.metadata.name.as_deref().unwrap_or_default();
            tracing::warn!(kind = kind.kind, name, %error, "stored object cannot be translated");
        }
    }
}

/// Returns the object to store so that it has the fields of `wanted`, which is in the users' form;
/// none if it has them already. Other fields stay.
pub fn merge(
    kind: &Kind,
    present: Option<&DynamicObject>,
    wanted: &Value,
) -> Result<Option<DynamicObject>, Error> {
    let Some(present) = present else {
        return to_storage(kind, wanted.clone()).map(Some);
    };
    let stored = serde_json::to_value(present).map_err(Error::SerdeError)?;
    let seen = storage::read(kind, stored).map_err(wrong)?;
    if let Some(problem) = seen.problems.first() {
        return Err(wrong(problem));
    }
    let mut merged = seen.object.clone();
    overlay(&mut merged, wanted);
    if merged == seen.object {
        Ok(None)
    } else {
        to_storage(kind, merged).map(Some)
    }
}

/// Translates an object in the users' form to the stored form.
pub fn to_storage(kind: &Kind, mut object: Value) -> Result<DynamicObject, Error> {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|field, _| !BOOKKEEPING.contains(&field.as_str()));
    }
    let stored = storage::write(kind, object).map_err(wrong)?;
    serde_json::from_value(stored).map_err(Error::SerdeError)
}

/// Replaces the UID of a precondition by the stored one, which differs from the user's.
pub fn uid_to_storage(params: &mut DeleteParams) {
    let uid = params
        .preconditions
        .as_mut()
        .and_then(|only| only.uid.as_mut());
    if let Some(uid) = uid
        && let Ok(stored) = storage::uid::flip(uid, "metadata.uid")
    {
        *uid = stored;
    }
}

fn wrong(why: impl std::fmt::Display) -> Error {
    Error::SerdeError(serde_json::Error::custom(why))
}

fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (field, value) in over {
                overlay(base.entry(field.clone()).or_insert(Value::Null), value);
            }
        }
        (base, over) => base.clone_from(over),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pool() -> &'static Kind {
        Kind::of("IPPool").unwrap()
    }

    /// A pool as Calico stores it: labels of users in the annotation, and a field that Margay does
    /// not know.
    fn stored() -> DynamicObject {
        let metadata = json!({
            "name": "p", "resourceVersion": "7", "uid": "7d0e4a52-91c1-4c56-b8a7-5b4b9fcb3a13",
            "creationTimestamp": "2024-01-01T00:00:00Z", "generation": 3,
            "annotations": {"projectcalico.org/metadata": r#"{"creationTimestamp":"2023-03-21T06:17:28Z","labels":{"team":"red"}}"#},
        });
        let spec =
            json!({"cidr": "10.244.0.0/16", "vxlanMode": "Always", "futureField": {"kept": true}});
        serde_json::from_value(json!({
            "apiVersion": "crd.projectcalico.org/v1",
            "kind": "IPPool",
            "metadata": metadata,
            "spec": spec,
        }))
        .unwrap()
    }

    #[test]
    fn fields_of_other_writers_stay() {
        let wanted = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {
                "name": "p",
                "labels": {"app.kubernetes.io/managed-by": "margay-operator"},
            },
            "spec": {"cidr": "10.244.0.0/16", "natOutgoing": true},
        });
        let merged = merge(pool(), Some(&stored()), &wanted)
            .unwrap()
            .expect("it differs");
        let text = serde_json::to_value(&merged).unwrap();
        assert_eq!(
            text["spec"],
            json!({
                "cidr": "10.244.0.0/16",
                "vxlanMode": "Always",
                "futureField": {"kept": true},
                "natOutgoing": true,
            })
        );
        let kept = r#"{"creationTimestamp":"2023-03-21T06:17:28Z","labels":{"app.kubernetes.io/managed-by":"margay-operator","team":"red"}}"#;
        assert_eq!(
            text["metadata"]["annotations"],
            json!({"projectcalico.org/metadata": kept})
        );
        assert_eq!(
            text["metadata"]["uid"],
            "7d0e4a52-91c1-4c56-b8a7-5b4b9fcb3a13"
        );
        assert_eq!(
            (&text["metadata"]["resourceVersion"], &text["apiVersion"]),
            (&json!("7"), &json!("crd.projectcalico.org/v1"))
        );
        assert!(text["metadata"]["labels"].is_null());
        assert_eq!(
            merge(pool(), Some(&merged), &wanted).unwrap(),
            None,
            "once is enough"
        );
    }

    #[test]
    fn objects_are_read_in_the_users_form() {
        let mut object = stored();
        from_storage(pool(), &mut object);
        assert_eq!(object.metadata.labels.unwrap()["team"], "red");
        assert_eq!(
            (
                &object.data["spec"]["blockSize"],
                &object.data["spec"]["nodeSelector"]
            ),
            (&json!(26), &json!("all()"))
        );
    }

    #[test]
    fn unreadable_metadata_is_not_overwritten() {
        let mut broken = stored();
        broken
            .metadata
            .annotations
            .as_mut()
            .unwrap()
            .insert("projectcalico.org/metadata".to_owned(), "{".to_owned());
        let error = merge(
            pool(),
            Some(&broken),
            &json!({"spec": {"natOutgoing": true}}),
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("metadata.annotations[projectcalico.org/metadata]"),
            "{error}"
        );
    }

    #[test]
    fn a_new_object_has_the_stored_form() {
        let wanted = json!({"metadata": {"name": "default"}, "spec": {}});
        let made = merge(Kind::of("FelixConfiguration").unwrap(), None, &wanted)
            .unwrap()
            .unwrap();
        let text = serde_json::to_value(&made).unwrap();
        assert_eq!(
            text["metadata"],
            json!({"name": "default", "annotations": {"projectcalico.org/metadata": "{}"}})
        );
    }
}
