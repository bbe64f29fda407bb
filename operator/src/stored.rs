//! Objects of the older storage, read as users see them and changed without losing what others have put there.

use kube::Error;
use kube::api::{DeleteParams, DynamicObject};
use margay_api::storage::{self, Kind};
use serde::de::Error as _;
use serde_json::Value;

/// Bookkeeping of the API server, which is no part of what users say.
const BOOKKEEPING: [&str; 3] = ["managedFields", "generation", "selfLink"];

/// Puts what users see in the place of what is stored; an object that cannot be read stays as it is, and that is logged.
pub fn see(kind: &Kind, object: &mut DynamicObject) {
    let seen = serde_json::to_value(&*object).map_err(storage::Fault::from).and_then(|stored| {
        let mut read = storage::read(kind, stored)?;
        storage::complete(kind, &mut read.object);
        Ok(serde_json::from_value(read.object)?)
    });
    match seen {
        Ok(seen) => *object = seen,
        Err(fault) => {
            let name = object.metadata.name.as_deref().unwrap_or_default();
            tracing::warn!(kind = kind.kind, name, %fault, "not understood");
        }
    }
}

/// What has to be stored so that an object has the fields of `wanted`, in the users' form; none if it has. Everything else of it stays.
pub fn merge(kind: &Kind, present: Option<&DynamicObject>, wanted: &Value) -> Result<Option<DynamicObject>, Error> {
    let Some(present) = present else {
        return store(kind, wanted.clone()).map(Some);
    };
    let stored = serde_json::to_value(present).map_err(Error::SerdeError)?;
    let seen = storage::read(kind, stored).map_err(wrong)?;
    if let Some(problem) = seen.problems.first() {
        return Err(wrong(problem));
    }
    let mut merged = seen.object.clone();
    overlay(&mut merged, wanted);
    if merged == seen.object { Ok(None) } else { store(kind, merged).map(Some) }
}

/// An object that users see in the form in which it is stored.
pub fn store(kind: &Kind, mut object: Value) -> Result<DynamicObject, Error> {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|field, _| !BOOKKEEPING.contains(&field.as_str()));
    }
    let stored = storage::write(kind, object).map_err(wrong)?;
    serde_json::from_value(stored).map_err(Error::SerdeError)
}

/// The identity that users see is not the stored one, which a deletion has to name.
pub fn unsee(params: &mut DeleteParams) {
    let uid = params.preconditions.as_mut().and_then(|only| only.uid.as_mut());
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

    /// A pool as Calico leaves it: labels of users in the annotation, a field that nothing here knows.
    fn stored() -> DynamicObject {
        let metadata = json!({
            "name": "p", "resourceVersion": "7", "uid": "7d0e4a52-91c1-4c56-b8a7-5b4b9fcb3a13",
            "creationTimestamp": "2024-01-01T00:00:00Z", "generation": 3,
            "annotations": {"projectcalico.org/metadata": r#"{"creationTimestamp":"2023-03-21T06:17:28Z","labels":{"team":"red"}}"#},
        });
        let spec = json!({"cidr": "10.244.0.0/16", "vxlanMode": "Always", "futureField": {"kept": true}});
        serde_json::from_value(
            json!({"apiVersion": "crd.projectcalico.org/v1", "kind": "IPPool", "metadata": metadata, "spec": spec}),
        )
        .unwrap()
    }

    #[test]
    fn what_others_have_put_there_stays() {
        let wanted = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {"name": "p", "labels": {"app.kubernetes.io/managed-by": "margay-operator"}},
            "spec": {"cidr": "10.244.0.0/16", "natOutgoing": true},
        });
        let merged = merge(pool(), Some(&stored()), &wanted).unwrap().expect("it differs");
        let text = serde_json::to_value(&merged).unwrap();
        assert_eq!(
            text["spec"],
            json!({"cidr": "10.244.0.0/16", "vxlanMode": "Always", "futureField": {"kept": true}, "natOutgoing": true})
        );
        let kept = r#"{"creationTimestamp":"2023-03-21T06:17:28Z","labels":{"app.kubernetes.io/managed-by":"margay-operator","team":"red"}}"#;
        assert_eq!(text["metadata"]["annotations"], json!({"projectcalico.org/metadata": kept}));
        assert_eq!(text["metadata"]["uid"], "7d0e4a52-91c1-4c56-b8a7-5b4b9fcb3a13");
        assert_eq!(
            (&text["metadata"]["resourceVersion"], &text["apiVersion"]),
            (&json!("7"), &json!("crd.projectcalico.org/v1"))
        );
        assert!(text["metadata"]["labels"].is_null());
        assert_eq!(merge(pool(), Some(&merged), &wanted).unwrap(), None, "once is enough");
    }

    #[test]
    fn what_is_read_is_what_users_see() {
        let mut object = stored();
        see(pool(), &mut object);
        assert_eq!(object.metadata.labels.unwrap()["team"], "red");
        assert_eq!(
            (&object.data["spec"]["blockSize"], &object.data["spec"]["nodeSelector"]),
            (&json!(26), &json!("all()"))
        );
    }

    #[test]
    fn metadata_that_cannot_be_read_is_not_written_over() {
        let mut broken = stored();
        broken.metadata.annotations.as_mut().unwrap().insert("projectcalico.org/metadata".to_owned(), "{".to_owned());
        let error = merge(pool(), Some(&broken), &json!({"spec": {"natOutgoing": true}})).unwrap_err().to_string();
        assert!(error.contains("metadata.annotations[projectcalico.org/metadata]"), "{error}");
    }

    #[test]
    fn a_new_object_has_the_stored_form() {
        let wanted = json!({"metadata": {"name": "default"}, "spec": {}});
        let made = merge(Kind::of("FelixConfiguration").unwrap(), None, &wanted).unwrap().unwrap();
        let text = serde_json::to_value(&made).unwrap();
        assert_eq!(text["metadata"], json!({"name": "default", "annotations": {"projectcalico.org/metadata": "{}"}}));
    }
}
