//! Objects as the watches deliver them.

use margay_api::meta::NamespacedName;
use margay_calc::update::Update;

/// The kind whose objects are endpoints.
pub const POD: &str = "Pod";

/// The kind whose objects assign address blocks to nodes.
pub const BLOCK: &str = "IPAMBlock";

/// Name and namespace of an object; the namespace is empty for cluster-scoped kinds.
pub type ObjectKey = NamespacedName;

/// An object as received by a watch.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The object.
    pub key: ObjectKey,
    /// Its uid: a later object of the same name has another one.
    pub uid: String,
    /// Its value, or the substitute for a refused one; `None` for irrelevant objects, such as a
    /// host-networked pod.
    pub update: Option<Update>,
    /// The object was refused and its former value, if it has one, remains in force; `update` is
    /// used only if it has none.
    pub prefers_former: bool,
    /// Reasons why it is not enforced as written.
    pub problems: Vec<String>,
}

/// Objects that are in the cache, but not in a complete list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Their number.
    pub total: usize,
    /// Some of them, spread over all.
    pub sample: Vec<ObjectKey>,
}

/// Kind and name of an object, for people.
pub fn subject(kind: &str, key: &ObjectKey) -> String {
    match key.namespace.as_str() {
        "" => format!("{kind} {}", key.name),
        _ => format!("{kind} {key}"),
    }
}
