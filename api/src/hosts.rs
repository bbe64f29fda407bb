//! Host endpoints that are made for nodes, in parsed form.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::meta::Labels;
use crate::selector::Selector;

/// Label of a host endpoint that was made for a node: by whom.
pub const LABEL_CREATED_BY: &str = "projectcalico.org/created-by";
/// The value of [`LABEL_CREATED_BY`]: Calico's, so that those of a cluster that is taken over are ours.
pub const CREATED_BY: &str = "calico-kube-controllers";

/// What is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AutoHostEndpoints {
    /// Of every node one for all of its interfaces.
    pub default: bool,
    /// More of them.
    pub templates: Vec<Template>,
}

/// Host endpoints for some interfaces of some nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// What tells these from others.
    pub name: String,
    /// Ranges of the interfaces' addresses; empty is any.
    pub nets: Vec<IpNet>,
    /// Labels over those of the node.
    pub labels: Labels,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Nodes that get one, over their labels.
    pub nodes: Selector,
}
