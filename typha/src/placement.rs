//! Which replica serves which node: every replica computes the same order from the same list, so
//! that nodes are spread evenly, stay where they are when others come and go, and move once.

use std::cmp::Reverse;
use std::hash::Hasher;

use margay_calc::graph::Graph;

/// Ready replica of typha.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Replica {
    /// Name of its pod.
    pub pod: String,
    /// Its address and port, as agents connect to it.
    pub server: String,
    /// Zone of its node; may be empty.
    pub zone: String,
}

/// The ready replicas, as this one knows them.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    own: String,
    replicas: Vec<Replica>,
    generation: u64,
}

/// Label of a node with its zone, from Kubernetes.
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Servers that a node is given: one whose first choices all refuse it need not try every replica
/// of a large cluster before it takes whichever answers.
const MAX_SERVERS: usize = 5;
/// Nodes that a replica takes before others are asked to take theirs, in any cluster.
const MIN_SHARE: usize = 100;
/// Percentage of an even share up to which a replica takes nodes, so that those of one replica that
/// fails find room (Calico's formula).
const SHARE_PERCENT: usize = 120;

impl Placement {
    /// Creates a placement of the replica with this pod, which knows of no other.
    pub fn new(own: &str) -> Self {
        Self {
            own: own.to_owned(),
            ..Self::default()
        }
    }

    /// Sets the ready replicas; returns true if they changed.
    pub fn set(&mut self, mut replicas: Vec<Replica>) -> bool {
        replicas.sort();
        replicas.dedup_by(|one, other| one.pod == other.pod);
        if self.replicas == replicas {
            return false;
        }
        self.replicas = replicas;
        self.generation += 1;
        true
    }

    /// Number of changes so far.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns true if there are other ready replicas.
    pub fn has_others(&self) -> bool {
        self.replicas.iter().any(|replica| replica.pod != self.own)
    }

    /// Servers in the order in which a node in this zone is to try them before the Service.
    pub fn servers(&self, node: &str, zone: &str) -> Vec<String> {
        let ranked = self.rank(node, zone).into_iter().take(MAX_SERVERS);
        ranked.map(|replica| replica.server.clone()).collect()
    }

    /// The same without this replica.
    pub fn others(&self, node: &str, zone: &str) -> Vec<String> {
        let ranked = self.rank(node, zone).into_iter();
        ranked
            .filter(|replica| replica.pod != self.own)
            .take(MAX_SERVERS)
            .map(|replica| replica.server.clone())
            .collect()
    }

    /// Returns true if another replica is the first choice of the node, and this one is ready too.
    pub fn is_misplaced(&self, node: &str, zone: &str) -> bool {
        let is_own = |replica: &Replica| replica.pod == self.own;
        let ranked = self.rank(node, zone);
        ranked.iter().any(|replica| is_own(replica))
            && ranked.first().is_some_and(|first| !is_own(first))
    }

    /// Number of nodes from which on this replica is full, in a cluster of so many; `None` if there
    /// is nobody else.
    pub fn limit(&self, nodes: usize) -> Option<usize> {
        let others = self.replicas.len().saturating_sub(1);
        if others == 0 || !self.has_others() {
            return None;
        }
        Some(
            (nodes * SHARE_PERCENT)
                .div_ceil(100 * others)
                .max(MIN_SHARE),
        )
    }

    /// Replicas of the node's zone first, then by rendezvous hashing: a replica that comes or goes
    /// changes the first choice of its own nodes only.
    fn rank(&self, node: &str, zone: &str) -> Vec<&Replica> {
        let mut ranked: Vec<&Replica> = self.replicas.iter().collect();
        ranked.sort_by_key(|replica| {
            let is_near = !zone.is_empty() && replica.zone == zone;
            (
                !is_near,
                Reverse(weight(node, &replica.server)),
                &replica.pod,
            )
        });
        ranked
    }
}

/// Zone of a node; empty if it is not known.
pub fn zone_of<'a>(graph: &'a Graph, node: &str) -> &'a str {
    graph
        .node(node)
        .and_then(|node| node.labels.get(LABEL_ZONE))
        .map_or("", String::as_str)
}

/// Weight of a server for a node: FNV-1a, whose last bytes are mixed by the finaliser of
/// SplitMix64. It is the same in every process and version.
fn weight(node: &str, server: &str) -> u64 {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    hash.write(node.as_bytes());
    hash.write(&[0]);
    hash.write(server.as_bytes());
    let mut mixed = hash.finish();
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// FNV-1a of 64 bits.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn mk_replicas(count: usize) -> Vec<Replica> {
        let replica = |number: usize| Replica {
            pod: format!("typha-{number}"),
            server: format!("192.0.2.{number}:5473"),
            zone: ["a", "b"][number % 2].to_owned(),
        };
        (0..count).map(replica).collect()
    }

    fn mk_placement(count: usize) -> Placement {
        let mut placement = Placement::new("typha-0");
        placement.set(mk_replicas(count));
        placement
    }

    fn first(placement: &Placement, node: usize) -> String {
        placement.servers(&format!("n{node}"), "")[0].clone()
    }

    #[test]
    fn nodes_are_spread_evenly_and_few_move_when_a_replica_comes_or_goes() {
        const NODES: usize = 5000;
        let (ten, nine) = (mk_placement(10), mk_placement(9));
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut moved = 0;
        for node in 0..NODES {
            let place = first(&ten, node);
            moved += usize::from(place != first(&nine, node));
            *counts.entry(place).or_default() += 1;
        }
        let (few, many) = (counts.values().min(), counts.values().max());
        assert!(few >= Some(&400) && many <= Some(&600), "{counts:?}");
        assert_eq!(
            moved, counts["192.0.2.9:5473"],
            "those of the replica that went"
        );
    }

    #[test]
    fn replicas_of_the_nodes_zone_come_first() {
        let placement = mk_placement(4);
        let zone_of = |server: &String| {
            let replicas = mk_replicas(4).into_iter();
            let mut own = replicas.filter(|replica| replica.server == *server);
            own.next().map(|replica| replica.zone).unwrap_or_default()
        };
        for node in ["n1", "n2", "n3"] {
            let zones: Vec<String> = placement.servers(node, "b").iter().map(zone_of).collect();
            assert_eq!(zones, ["b", "b", "a", "a"], "{node}");
            assert_eq!(placement.others(node, "b").len(), 3);
        }
    }

    #[test]
    fn a_replica_is_full_above_its_share_unless_it_is_alone() {
        let table = [
            (1, 5000, None),
            (2, 50, Some(100)),
            (2, 1000, Some(1200)),
            (27, 5000, Some(231)),
        ];
        for (replicas, nodes, limit) in table {
            assert_eq!(
                mk_placement(replicas).limit(nodes),
                limit,
                "{replicas} {nodes}"
            );
        }
        assert_eq!(Placement::default().limit(5000), None);
        let many = mk_placement(27);
        assert_eq!(
            (many.servers("n1", "").len(), many.others("n1", "").len()),
            (5, 5)
        );
    }

    #[test]
    fn a_replica_that_is_not_ready_itself_sends_nobody_away() {
        let mut placement = mk_placement(3);
        let misplaced = |placement: &Placement| {
            (0..64)
                .filter(|node| placement.is_misplaced(&format!("n{node}"), ""))
                .count()
        };
        assert!(misplaced(&placement) > 20);
        assert!(placement.set(mk_replicas(3).split_off(1)));
        assert_eq!((misplaced(&placement), placement.has_others()), (0, true));
        assert!(!placement.set(mk_replicas(3).split_off(1)), "the same");
    }
}
