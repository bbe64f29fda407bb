//! How many typha replicas a cluster gets.

use margay_api::installation::ReplicaBounds;

/// Replicas for `nodes` usable nodes: 1 up to two nodes, 2 up to four, else one for 200 nodes and two more, at least three; then clamped to the
/// bounds, of which the lower one wins. The formula is Calico's, so that a taken-over cluster keeps its size.
pub fn typha_replicas(nodes: usize, bounds: Option<&ReplicaBounds>) -> i32 {
    let wanted = match nodes {
        0..=2 => 1,
        3..=4 => 2,
        _ => i32::try_from(nodes / 200 + 2).unwrap_or(i32::MAX).max(3),
    };
    let minimum = bounds.and_then(|b| b.minimum).unwrap_or(1).max(1);
    let maximum = bounds.and_then(|b| b.maximum).unwrap_or(i32::MAX);
    wanted.min(maximum).max(minimum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_formula_and_the_bounds() {
        for (nodes, wanted) in [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (199, 3), (400, 4), (5000, 27)] {
            assert_eq!(typha_replicas(nodes, None), wanted, "{nodes} nodes");
        }
        let bounds = ReplicaBounds { minimum: Some(2), maximum: Some(5) };
        assert_eq!(typha_replicas(1, Some(&bounds)), 2);
        assert_eq!(typha_replicas(5000, Some(&bounds)), 5);
    }
}
