//! What is wrong with a node as a whole, in a form whose size is bounded.

use margay_api::report::cut;

use super::wire;

/// Problems of one node that are told; more are left out.
const PER_NODE: usize = 32;
/// Bytes of a code.
const CODE: usize = 64;
/// Bytes of a message.
const MESSAGE: usize = 512;

/// Something that is wrong with a node and that no record shows: a route that cannot be made, a kernel that lacks something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeProblem {
    /// Names it among the node's problems, `routes` say; a node has at most one of each.
    pub code: String,
    /// What is wrong, what follows from it and the remedy.
    pub message: String,
    /// Something that was asked for is not so; otherwise it is a hint.
    pub degraded: bool,
}

impl NodeProblem {
    /// A problem whose texts are cut to what may be told.
    pub fn new(code: &str, message: &str, degraded: bool) -> Self {
        Self { code: cut(code, CODE), message: cut(message, MESSAGE), degraded }
    }

    /// The problem as it is sent.
    pub fn into_wire(self) -> wire::NodeProblem {
        let Self { code, message, degraded } = self;
        wire::NodeProblem { code, message, degraded }
    }

    /// As many of the problems as are told of a node, within the bounds whoever made them.
    pub fn bounded(problems: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let told = problems.into_iter().take(PER_NODE);
        told.map(|problem| Self::new(&problem.code, &problem.message, problem.degraded)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_says_of_itself_is_of_limited_size_and_on_one_line() {
        let long = "ä\n".repeat(10_000);
        let many = (0..500).map(|_| NodeProblem { code: long.clone(), message: long.clone(), degraded: true });
        let told = NodeProblem::bounded(many);
        assert_eq!(told.len(), PER_NODE);
        assert!(told.iter().all(|problem| problem.code.len() <= CODE && problem.message.len() <= MESSAGE));
        assert!(told.iter().all(|problem| problem.message.ends_with('…') && !problem.message.contains('\n')));
        let short = NodeProblem::new("routes", "no route", false);
        assert_eq!(NodeProblem::bounded([short.clone()]), [short]);
    }
}
