//! The pools as this node sees them, kept up to date by a watch of IPPools.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use margay_api::meta::Labels;
use margay_api::selector::Selector;
use margay_api::v3::IPPool;
use margay_api::v3::pool::IPPoolSpec;
use tokio::sync::watch;

/// Block sizes of pools without `blockSize`.
const BLOCK_SIZE_V4: u8 = 26;
const BLOCK_SIZE_V6: u8 = 122;
/// Host bits of the largest block, which has 4096 addresses.
pub(super) const LARGEST_BLOCK: u8 = 12;
/// Condition of pools that addresses may be assigned from.
const ALLOCATABLE: &str = "Allocatable";

/// All objects of a kind by name; none until they have been listed.
pub type Listed<K> = Option<Arc<BTreeMap<String, K>>>;

/// The pools as this node sees them, by name; `None` until they have been listed.
pub type Pools = Option<Arc<Vec<NodePool>>>;

/// A pool as a node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePool {
    /// Name of the object.
    pub name: String,
    /// Range.
    pub cidr: IpNet,
    /// Prefix length of its blocks.
    pub block_size: u8,
    /// True when it serves only those who name it (`assignmentMode: Manual`).
    pub manual: bool,
    /// True when its nodeSelector selects this node; elsewhere it serves only those who name it.
    pub selected: bool,
    /// Namespaces whose pods it serves, also when they name it; none: all.
    pub namespaces: Option<Selector>,
    /// True when workloads may use it.
    pub workloads: bool,
    /// True when tunnels may use it.
    pub tunnels: bool,
    /// Reason why nothing is assigned from it any more, if so; a text that follows its name.
    /// Addresses in use stay.
    pub closed: Option<String>,
    /// True while it is being deleted: its empty blocks are released at once, and a tunnel's
    /// address moves to another pool.
    pub is_terminating: bool,
}

/// Use of an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Use {
    /// A pod.
    #[default]
    Workload,
    /// A tunnel device of the node.
    Tunnel,
}

/// Choice of the pools that an address may come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolChoice {
    /// Use of the address.
    pub usage: Use,
    /// Names or ranges of pools; empty: any pool that need not be named.
    pub named: Vec<String>,
    /// Pools with a namespaceSelector that selects the namespace of the pod.
    pub admitted: BTreeSet<String>,
}

/// Returns true when the block is of a pool that this node may use. Only such blocks count for the
/// limit of a node.
pub(super) fn can_serve(pools: &[NodePool], cidr: IpNet) -> bool {
    pools
        .iter()
        .any(|pool| pool.can_serve() && pool.cidr.contains(&cidr))
}

impl NodePool {
    /// Reason why the pool does not serve the choice, if so; a text that follows its name.
    pub fn refusal(&self, choice: &PoolChoice) -> Option<&str> {
        let is_named = choice.named.iter().any(|name| self.is_named(name));
        let for_use = match choice.usage {
            Use::Workload => self.workloads,
            Use::Tunnel => self.tunnels,
        };
        match (&self.closed, choice.usage) {
            (Some(why), _) => Some(why),
            (None, Use::Workload) if !for_use => Some("is not for workloads (allowedUses)"),
            (None, Use::Tunnel) if !for_use => Some("is not for tunnels (allowedUses)"),
            _ if self.namespaces.is_some() && !choice.admitted.contains(&self.name) => {
                Some("has a namespaceSelector that does not select the pod's namespace")
            }
            _ if is_named => None,
            _ if !choice.named.is_empty() => Some("is not among the pools that are named"),
            _ if self.manual => Some("has to be named (assignmentMode Manual)"),
            _ if !self.selected => Some("has a nodeSelector that does not select this node"),
            _ => None,
        }
    }

    /// Returns true when the pool serves the choice.
    pub fn serves(&self, choice: &PoolChoice) -> bool {
        self.refusal(choice).is_none()
    }

    /// Returns true when this node uses the pool without naming it. Blocks of such pools are kept.
    pub fn is_for_node(&self) -> bool {
        self.closed.is_none() && self.selected && !self.manual
    }

    /// Returns true when this node may have blocks of the pool, named or not.
    fn can_serve(&self) -> bool {
        self.closed.is_none() && self.selected
    }

    /// Returns true when that is its name or its range.
    pub fn is_named(&self, name: &str) -> bool {
        name == self.name || name.parse() == Ok(self.cidr)
    }

    /// Returns true when the range is a block of the pool at its present block size.
    pub fn has_block(&self, cidr: IpNet) -> bool {
        self.cidr.contains(&cidr) && cidr.prefix_len() == self.block_size && cidr.trunc() == cidr
    }
}

/// The pools of `listed` as a node with these `labels` sees them; unknown until both are known.
pub fn follow(
    listed: watch::Receiver<Listed<IPPool>>,
    labels: watch::Receiver<Option<Labels>>,
) -> watch::Receiver<Pools> {
    let (sender, receiver) = watch::channel(Pools::default());
    tokio::spawn(run(listed, labels, sender));
    receiver
}

async fn run(
    mut listed: watch::Receiver<Listed<IPPool>>,
    mut labels: watch::Receiver<Option<Labels>>,
    sender: watch::Sender<Pools>,
) {
    loop {
        let known = listed.borrow_and_update().clone();
        let of_labels = labels.borrow_and_update().clone();
        let pools = known
            .zip(of_labels)
            .map(|(known, labels)| Arc::new(of_node(&known, &labels)));
        sender.send_if_modified(|present| {
            let differs = *present != pools;
            *present = pools;
            differs
        });
        let changed = tokio::select! {
            changed = listed.changed() => changed,
            changed = labels.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Pools as a node with these labels sees them, by name. A pool with an invalid range or blockSize
/// is left out, because its blocks are unknown.
pub fn of_node(pools: &BTreeMap<String, IPPool>, labels: &Labels) -> Vec<NodePool> {
    let kept_out = kept_out(pools);
    let pool = |(name, object): (&String, &IPPool)| {
        let spec = &object.spec;
        let cidr: IpNet = spec.cidr.parse().ok()?;
        let uses = |wanted: &str| {
            spec.allowed_uses
                .as_ref()
                .is_none_or(|uses| uses.is_empty() || uses.iter().any(|used| used == wanted))
        };
        let (selects_node, namespaces, selectors) = selectors(spec, labels);
        Some(NodePool {
            name: name.clone(),
            cidr: cidr.trunc(),
            block_size: block_size(spec, cidr)?,
            manual: spec.assignment_mode.as_deref() == Some("Manual"),
            selected: selects_node,
            namespaces,
            workloads: uses("Workload"),
            tunnels: uses("Tunnel"),
            closed: closed(object, kept_out.get(name.as_str()).copied()).or(selectors),
            is_terminating: object.metadata.deletion_timestamp.is_some(),
        })
    };
    pools.iter().filter_map(pool).collect()
}

fn block_size(spec: &IPPoolSpec, cidr: IpNet) -> Option<u8> {
    let default = if cidr.addr().is_ipv4() {
        BLOCK_SIZE_V4
    } else {
        BLOCK_SIZE_V6
    };
    spec.block_size
        .map_or(Some(default), |size| u8::try_from(size).ok())
        .filter(|size| {
            (cidr.max_prefix_len() - LARGEST_BLOCK..=cidr.max_prefix_len()).contains(size)
                && *size >= cidr.prefix_len()
        })
}

/// Evaluates the selectors: true when the node is selected, the selector of namespaces, and the
/// reason why the pool serves nobody if a selector is invalid.
fn selectors(spec: &IPPoolSpec, labels: &Labels) -> (bool, Option<Selector>, Option<String>) {
    let all = |text: &Option<String>| {
        text.as_deref()
            .map(str::trim)
            .is_none_or(|text| text.is_empty() || text == "all()")
    };
    let parse = |text: &Option<String>| Selector::parse(text.as_deref().unwrap_or("all()"));
    let wrong = |field: &str, text: &Option<String>| {
        format!(
            "has a {field} that is no selector: {:?}; correct it",
            text.as_deref().unwrap_or_default()
        )
    };
    match (parse(&spec.node_selector), parse(&spec.namespace_selector)) {
        (Ok(node), Ok(namespaces)) => (
            node.matches(labels),
            Some(namespaces).filter(|_| !all(&spec.namespace_selector)),
            None,
        ),
        (Err(_), _) => (
            false,
            None,
            Some(wrong("nodeSelector", &spec.node_selector)),
        ),
        (_, Err(_)) => (
            false,
            None,
            Some(wrong("namespaceSelector", &spec.namespace_selector)),
        ),
    }
}

/// Reason why nothing is assigned from a pool, if so. `winner` is the pool that overlaps it and
/// comes first, as long as the condition says nothing.
fn closed(object: &IPPool, winner: Option<&str>) -> Option<String> {
    if object.spec.disabled.unwrap_or(false) {
        return Some("is disabled".to_owned());
    }
    // The condition follows later.
    if object.metadata.deletion_timestamp.is_some() {
        return Some("is being deleted".to_owned());
    }
    match allocatable(object) {
        Some(condition) if condition.status == "False" => Some(format!(
            "is not allocatable: {}",
            condition.message.trim_end_matches('.')
        )),
        Some(_) => None,
        None => winner
            .map(|other| format!("overlaps IPPool {other}, which comes first; delete one of them")),
    }
}

/// Returns the pools that overlap another one, with the one that comes first. The operator decides
/// in the same way, but has no place to write it in the older storage. Pools whose condition is
/// true come first, then older ones.
fn kept_out(pools: &BTreeMap<String, IPPool>) -> BTreeMap<&str, &str> {
    let may_hold = |pool: &&IPPool| {
        let is_false = allocatable(pool).is_some_and(|condition| condition.status == "False");
        !pool.spec.disabled.unwrap_or(false)
            && (!is_false || pool.metadata.deletion_timestamp.is_some())
    };
    let mut ordered: Vec<(&String, &IPPool)> =
        pools.iter().filter(|(_, pool)| may_hold(pool)).collect();
    ordered.sort_by_key(|(name, pool)| {
        (
            allocatable(pool).is_none(),
            pool.metadata.creation_timestamp.clone(),
            *name,
        )
    });
    let (mut holders, mut kept_out): (Vec<(&str, &IPPoolSpec)>, _) = (Vec::new(), BTreeMap::new());
    for (name, pool) in ordered {
        match holders
            .iter()
            .find(|(_, holder)| overlap(holder, &pool.spec))
        {
            Some((holder, _)) => drop(kept_out.insert(name.as_str(), *holder)),
            None => holders.push((name, &pool.spec)),
        }
    }
    kept_out
}

fn allocatable(pool: &IPPool) -> Option<&Condition> {
    pool.status
        .as_ref()?
        .conditions
        .iter()
        .find(|condition| condition.type_ == ALLOCATABLE)
}

fn overlap(one: &IPPoolSpec, other: &IPPoolSpec) -> bool {
    let range = |spec: &IPPoolSpec| spec.cidr.parse::<IpNet>().ok();
    range(one)
        .zip(range(other))
        .is_some_and(|(one, other)| one.contains(&other) || other.contains(&one))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use margay_api::v3::pool::IPPoolStatus;

    /// Name, whom it serves, and what makes it so.
    type Case = (&'static str, [bool; 4], fn(&mut IPPool));

    fn mk_pool(name: &str, cidr: &str, change: impl FnOnce(&mut IPPool)) -> (String, IPPool) {
        let spec = IPPoolSpec {
            cidr: cidr.to_owned(),
            ..IPPoolSpec::default()
        };
        let mut pool = IPPool::new(name, spec);
        change(&mut pool);
        (name.to_owned(), pool)
    }

    fn seen(pools: impl IntoIterator<Item = (String, IPPool)>) -> Vec<NodePool> {
        let labels = Labels::from([("rack".to_owned(), "one".to_owned())]);
        of_node(&pools.into_iter().collect(), &labels)
    }

    #[test]
    fn a_pool_serves_where_its_selectors_its_uses_and_its_condition_allow() {
        // Name, who it serves: workloads and tunnels that name nothing; workloads that name it;
        // workloads of a namespace that it admits.
        let table: [Case; 12] = [
            ("default", [true, true, true, true], |_| {}),
            ("disabled", [false; 4], |pool| {
                pool.spec.disabled = Some(true)
            }),
            ("elsewhere", [false, false, true, false], |pool| {
                pool.spec.node_selector = Some("rack == 'two'".to_owned())
            }),
            ("here", [true, true, true, true], |pool| {
                pool.spec.node_selector = Some("rack == 'one'".to_owned())
            }),
            ("manual", [false, false, true, false], |pool| {
                pool.spec.assignment_mode = Some("Manual".to_owned())
            }),
            ("tunnels", [false, true, false, false], |pool| {
                pool.spec.allowed_uses = Some(vec!["Tunnel".to_owned()])
            }),
            ("workloads", [true, false, true, true], |pool| {
                pool.spec.allowed_uses = Some(vec!["Workload".to_owned()])
            }),
            ("wrong", [false; 4], |pool| {
                pool.spec.node_selector = Some("rack ==".to_owned())
            }),
            ("wrong-namespaces", [false; 4], |pool| {
                pool.spec.namespace_selector = Some("team ==".to_owned())
            }),
            ("team", [false, false, false, true], |pool| {
                pool.spec.namespace_selector = Some("team == 'a'".to_owned())
            }),
            ("not-allocatable", [false; 4], |pool| {
                pool.status = Some(condition("False"))
            }),
            ("leaving", [false; 4], |pool| {
                (pool.status, pool.metadata.deletion_timestamp) =
                    (Some(condition("True")), Some(time()));
            }),
        ];
        for (name, wanted, change) in table {
            let pools = seen([mk_pool(name, "10.0.0.0/16", change)]);
            let choice = |usage, named: &[&str], admitted: &[&str]| PoolChoice {
                usage,
                named: named.iter().map(|name| (*name).to_owned()).collect(),
                admitted: admitted.iter().map(|name| (*name).to_owned()).collect(),
            };
            let asked = [
                choice(Use::Workload, &[], &[]),
                choice(Use::Tunnel, &[], &[]),
                choice(Use::Workload, &[name], &[]),
                choice(Use::Workload, &[], &[name]),
            ];
            let found =
                asked.map(|choice| pools.iter().any(|pool| pool.refusal(&choice).is_none()));
            assert_eq!(found, wanted, "{name}");
        }
    }

    fn time() -> Time {
        serde_json::from_value("2026-01-01T00:00:00Z".into()).expect("a time")
    }

    fn condition(status: &str) -> IPPoolStatus {
        let condition = Condition {
            type_: ALLOCATABLE.to_owned(),
            status: status.to_owned(),
            reason: "Overlaps".to_owned(),
            message: "it overlaps pool x.".to_owned(),
            last_transition_time: time(),
            observed_generation: None,
        };
        IPPoolStatus {
            conditions: vec![condition],
        }
    }

    #[test]
    fn ranges_and_block_sizes_that_are_wrong_are_left_out() {
        let sized = |size: i32| move |pool: &mut IPPool| pool.spec.block_size = Some(size);
        let pools = [
            mk_pool("huge", "fd00::/48", sized(64)),
            mk_pool("nothing", "10.0.0.0", |_| {}),
            mk_pool("six", "fd01::/48", |_| {}),
            mk_pool("tiny", "10.0.0.0/16", sized(12)),
            mk_pool("wide", "10.1.0.0/27", sized(26)),
        ];
        let found: Vec<(String, u8)> = seen(pools)
            .into_iter()
            .map(|pool| (pool.name, pool.block_size))
            .collect();
        assert_eq!(found, [("six".to_owned(), 122)]);
    }

    #[test]
    fn of_pools_that_overlap_one_serves() {
        let at = |time: &str| {
            let time: serde_json::Value = time.into();
            move |pool: &mut IPPool| {
                pool.metadata.creation_timestamp =
                    Some(serde_json::from_value(time).expect("a time"));
            }
        };
        let old = || mk_pool("z-old", "10.0.0.0/16", at("2026-01-01T00:00:00Z"));
        let new = |change: fn(&mut IPPool)| {
            mk_pool("a-new", "10.0.1.0/24", move |pool| {
                at("2026-01-02T00:00:00Z")(pool);
                change(pool);
            })
        };
        let open = |pools: [(String, IPPool); 2]| {
            let open = seen(pools).into_iter().filter(|pool| pool.closed.is_none());
            open.map(|pool| pool.name).collect::<Vec<_>>()
        };
        assert_eq!(open([old(), new(|_| {})]), ["z-old"]);
        assert_eq!(
            open([old(), new(|pool| pool.status = Some(condition("True")))]),
            ["a-new"]
        );
        assert_eq!(
            open([old(), new(|pool| pool.spec.cidr = "10.1.0.0/24".to_owned())]),
            ["a-new", "z-old"]
        );
        let of_old = |change: fn(&mut IPPool)| {
            let (name, mut pool) = old();
            change(&mut pool);
            (name, pool)
        };
        assert_eq!(
            open([of_old(|pool| pool.spec.disabled = Some(true)), new(|_| {})]),
            ["a-new"]
        );
        assert_eq!(
            open([
                of_old(|pool| pool.status = Some(condition("False"))),
                new(|_| {})
            ]),
            ["a-new"]
        );
        let text = seen([old(), new(|_| {})])[0].closed.clone();
        assert_eq!(
            text.as_deref(),
            Some("overlaps IPPool z-old, which comes first; delete one of them")
        );
        // What is kept out keeps nobody out.
        let third = mk_pool("third", "10.0.2.0/24", at("2026-01-03T00:00:00Z"));
        let wide = new(|pool| pool.spec.cidr = "10.0.0.0/8".to_owned());
        let first = of_old(|pool| pool.spec.cidr = "10.0.1.0/24".to_owned());
        let open: Vec<String> = seen([first, wide, third])
            .into_iter()
            .filter(|pool| pool.closed.is_none())
            .map(|pool| pool.name)
            .collect();
        assert_eq!(open, ["third", "z-old"]);
    }
}
