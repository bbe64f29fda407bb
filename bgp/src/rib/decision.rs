//! Best path selection (RFC 4271 section 9.1.2, RFC 4456 section 9).
//!
//! Each step removes from the set what is worse than another of the set, as the RFC describes it,
//! so the result does not depend on the order of the paths. MULTI_EXIT_DISC, which is compared
//! among routes of one neighbouring AS alone, would make a comparison of pairs depend on it.

use std::net::{IpAddr, Ipv4Addr};

use crate::attributes::{Attributes, DEFAULT_LOCAL_PREF};

/// A path that may be chosen: it has passed import, and its next hop is reachable.
#[derive(Debug, Clone, Copy)]
pub struct Contender<'a> {
    /// Its attributes.
    pub attributes: &'a Attributes,
    /// Who sent it; none for a route that begins here, which is preferred to all others.
    pub sender: Option<Sender>,
    /// Cost to its next hop.
    pub metric: u32,
}

/// The peer of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sender {
    /// It is of our own AS.
    pub is_internal: bool,
    /// Its BGP identifier.
    pub router_id: Ipv4Addr,
    /// Its address.
    pub address: IpAddr,
}

/// Indices of the paths that packets may take together, the best one first: it is the one that is
/// announced. Empty if there is none.
pub fn select(contenders: &[Contender<'_>]) -> Vec<usize> {
    let mut set: Vec<usize> = (0..contenders.len()).collect();
    let at = |index: &usize| &contenders[*index];
    keep_least(&mut set, |index| at(index).sender.is_some());
    keep_least(&mut set, |index| {
        u32::MAX
            - at(index)
                .attributes
                .local_pref
                .unwrap_or(DEFAULT_LOCAL_PREF)
    });
    keep_least(&mut set, |index| at(index).attributes.as_path.length());
    keep_least(&mut set, |index| at(index).attributes.origin);
    let med = |index: &usize| at(index).attributes.med.unwrap_or(0);
    let neighbor = |index: &usize| at(index).attributes.as_path.neighbor();
    let before = set.clone();
    set.retain(|index| {
        let is_better =
            |other: &usize| neighbor(other) == neighbor(index) && med(other) < med(index);
        !before.iter().any(is_better)
    });
    keep_least(&mut set, |index| {
        at(index).sender.is_some_and(|sender| sender.is_internal)
    });
    keep_least(&mut set, |index| at(index).metric);
    // What is left is equally near; the rest makes one of them the best.
    set.sort_by_key(|index| {
        let contender = at(index);
        let own = contender.sender.map(|sender| sender.router_id);
        let router_id = contender.attributes.originator_id.or(own);
        let clusters = contender.attributes.cluster_list.len();
        (
            router_id,
            clusters,
            contender.sender.map(|sender| sender.address),
        )
    });
    set
}

fn keep_least<K: Ord>(set: &mut Vec<usize>, key: impl Fn(&usize) -> K) {
    if let Some(least) = set.iter().map(&key).min() {
        set.retain(|index| key(index) == least);
    }
}

#[cfg(test)]
mod tests;
