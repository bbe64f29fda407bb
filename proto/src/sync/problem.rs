//! Problems of a node as a whole, limited in size.

use margay_api::report::cut;

use super::wire;

/// Maximal number of reported problems of one node; further ones are dropped.
const MAX_PER_NODE: usize = 32;
/// Maximal length of a code, in bytes.
const MAX_CODE: usize = 64;
/// Maximal length of a message, in bytes.
const MAX_MESSAGE_BYTES: usize = 512;

/// A problem of the node that no record shows: a route that cannot be programmed, a missing kernel
/// feature.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeProblem {
    /// Identifies the problem among those of the node, such as `routes`; a node has at most one of
    /// each.
    pub code: String,
    /// The problem, its consequence and the remedy.
    pub message: String,
    /// True if something does not work as requested; false for a hint.
    pub degraded: bool,
}

impl NodeProblem {
    /// Creates a problem, cutting its strings to their maximal lengths.
    pub fn new(code: &str, message: &str, degraded: bool) -> Self {
        Self {
            code: cut(code, MAX_CODE),
            message: cut(message, MAX_MESSAGE_BYTES),
            degraded,
        }
    }

    /// Converts to wire form.
    pub fn into_wire(self) -> wire::NodeProblem {
        let Self {
            code,
            message,
            degraded,
        } = self;
        wire::NodeProblem {
            code,
            message,
            degraded,
        }
    }

    /// Limits problems in number and length, whatever their source.
    pub fn bounded(problems: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let kept = problems.into_iter().take(MAX_PER_NODE);
        kept.map(|problem| Self::new(&problem.code, &problem.message, problem.degraded))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_of_a_node_are_limited_in_size_and_on_one_line() {
        let long = "ä\n".repeat(10_000);
        let many = (0..500).map(|_| NodeProblem {
            code: long.clone(),
            message: long.clone(),
            degraded: true,
        });
        let kept = NodeProblem::bounded(many);
        assert_eq!(kept.len(), MAX_PER_NODE);
        assert!(
            kept.iter().all(|problem| problem.code.len() <= MAX_CODE
                && problem.message.len() <= MAX_MESSAGE_BYTES)
        );
        assert!(
            kept.iter()
                .all(|problem| problem.message.ends_with('…') && !problem.message.contains('\n'))
        );
        let short = NodeProblem::new("routes", "no route", false);
        assert_eq!(NodeProblem::bounded([short.clone()]), [short]);
    }
}
