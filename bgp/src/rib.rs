//! Routes by prefix: what peers sent, what of it import has accepted, and what is chosen.

pub mod decision;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use self::decision::{Contender, Sender, select};
use crate::attributes::{AttributeStore, Attributes, Family, NextHop};
use crate::config::PeerId;

/// What is known of the way to a next hop.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NextHopInfo {
    /// Cost, which decides between paths that are equal otherwise (RFC 4271 section 9.1.2.2 e).
    pub metric: u32,
    /// Name of the interface.
    pub interface: Option<String>,
    /// Gateway to it, if it is on no link.
    pub gateway: Option<IpAddr>,
}

/// A route for the kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRoute {
    /// Next hops of equal cost, in order.
    pub next_hops: Vec<NextHop>,
    /// Metric.
    pub priority: u32,
}

/// Change of a route in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteChange {
    /// The route is to be there, instead of the former one.
    Set {
        /// Its prefix.
        net: IpNet,
        /// The route.
        route: Arc<KernelRoute>,
    },
    /// The route is to go.
    Remove {
        /// Its prefix.
        net: IpNet,
    },
}

/// A route that begins here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalRoute {
    /// Its prefix.
    pub net: IpNet,
    /// Interface that it leads to, for filters.
    pub interface: Option<String>,
    /// Its metric in the kernel, for filters and for moving pods; the normal one if not given.
    pub priority: Option<u32>,
}

/// Who a path is from. Local ones come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    Local,
    Peer(PeerId),
}

/// What import makes of a route: the attributes that count, and its metric in the kernel.
pub(crate) type Imported = Option<(Arc<Attributes>, u32)>;

/// Imports a route: store, prefix, attributes as received, and the interface that they lead to.
pub(crate) type Import<'a> =
    dyn FnMut(&mut AttributeStore, &IpNet, &Arc<Attributes>, Option<&str>) -> Imported + 'a;

#[derive(Debug)]
struct Path {
    source: Source,
    received: Arc<Attributes>,
    accepted: Option<Arc<Attributes>>,
    priority: u32,
    /// Not sent since the peer's restart or the beginning of its refresh.
    is_stale: bool,
}

#[derive(Debug, Default)]
struct Entry {
    /// In the order of their sources, one of each.
    paths: Vec<Path>,
    best: Option<Best>,
    installed: Option<Arc<KernelRoute>>,
}

/// The chosen path of a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Best {
    pub(crate) source: Source,
    pub(crate) attributes: Arc<Attributes>,
    pub(crate) priority: u32,
}

/// How many routes of a peer there are, and what they weigh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Prefixes of IPv4 and IPv6.
    pub prefixes: [usize; 2],
    /// Bytes of memory, where attributes that routes share count for each of them.
    pub bytes: usize,
}

/// What a path costs beside its attributes: about the bytes of a prefix in the table.
const PATH_WEIGHT: usize = 128;

/// The routes of all peers.
#[derive(Debug, Default)]
pub(crate) struct Rib {
    pub(crate) store: AttributeStore,
    table: BTreeMap<IpNet, Entry>,
    dirty: BTreeSet<IpNet>,
    usage: BTreeMap<PeerId, Usage>,
    senders: BTreeMap<PeerId, Sender>,
    next_hops: BTreeMap<IpAddr, Option<NextHopInfo>>,
    latest: Option<Arc<KernelRoute>>,
}

/// What decides about installation and reachability.
#[derive(Clone, Copy)]
pub(crate) struct Selection<'a> {
    pub(crate) max_paths: usize,
    pub(crate) assume_reachable: bool,
    pub(crate) installs: &'a dyn Fn(&IpNet) -> bool,
}

impl Rib {
    pub(crate) fn set_sender(&mut self, peer: PeerId, sender: Sender) {
        if self.senders.insert(peer, sender) != Some(sender) {
            // Its identifier is one of the things that decide.
            self.touch_peer(peer);
        }
    }

    /// Takes a route in. Returns what the peer's routes come to.
    pub(crate) fn insert(
        &mut self,
        net: IpNet,
        source: Source,
        received: Arc<Attributes>,
        imported: Imported,
    ) -> Usage {
        let entry = self.table.entry(net).or_default();
        let weight = received.weight();
        let (accepted, priority) =
            imported.map_or((None, 0), |(each, priority)| (Some(each), priority));
        let path = Path {
            source,
            received,
            accepted,
            priority,
            is_stale: false,
        };
        let (former, is_changed) = match entry
            .paths
            .binary_search_by_key(&source, |path| path.source)
        {
            Ok(at) => {
                let former = std::mem::replace(&mut entry.paths[at], path);
                let now = &entry.paths[at];
                let is_changed =
                    (&former.accepted, former.priority) != (&now.accepted, now.priority);
                (Some(former), is_changed)
            }
            Err(at) => {
                entry.paths.insert(at, path);
                (None, true)
            }
        };
        if is_changed {
            self.dirty.insert(net);
        }
        let Source::Peer(peer) = source else {
            return Usage::default();
        };
        let usage = self.usage.entry(peer).or_default();
        usage.bytes += weight + PATH_WEIGHT;
        match former {
            Some(former) => usage.bytes -= former.received.weight() + PATH_WEIGHT,
            None => usage.prefixes[Family::of(&net) as usize] += 1,
        }
        *usage
    }

    /// Removes a route.
    pub(crate) fn remove(&mut self, net: &IpNet, source: Source) {
        let Some(entry) = self.table.get_mut(net) else {
            return;
        };
        if let Ok(at) = entry
            .paths
            .binary_search_by_key(&source, |path| path.source)
        {
            let path = entry.paths.remove(at);
            Self::forget(&mut self.usage, net, &path);
            self.dirty.insert(*net);
        }
    }

    fn forget(usage: &mut BTreeMap<PeerId, Usage>, net: &IpNet, path: &Path) {
        if let Source::Peer(peer) = path.source
            && let Some(usage) = usage.get_mut(&peer)
        {
            usage.prefixes[Family::of(net) as usize] -= 1;
            usage.bytes -= path.received.weight() + PATH_WEIGHT;
        }
    }

    /// Marks the routes of a peer and a family: those that are not sent again go by
    /// [`Self::remove_routes`].
    pub(crate) fn mark_stale(&mut self, peer: PeerId, family: Family) {
        for (net, entry) in &mut self.table {
            if Family::of(net) == family
                && let Ok(at) = entry
                    .paths
                    .binary_search_by_key(&Source::Peer(peer), |path| path.source)
            {
                entry.paths[at].is_stale = true;
            }
        }
    }

    /// Removes the routes of a peer and a family: all, or those that are stale. Returns how many.
    pub(crate) fn remove_routes(
        &mut self,
        peer: PeerId,
        family: Family,
        only_stale: bool,
    ) -> usize {
        if self
            .usage
            .get(&peer)
            .is_none_or(|usage| usage.prefixes[family as usize] == 0)
        {
            return 0;
        }
        let mut removed = 0;
        for (net, entry) in &mut self.table {
            if Family::of(net) == family
                && let Ok(at) = entry
                    .paths
                    .binary_search_by_key(&Source::Peer(peer), |path| path.source)
                && (entry.paths[at].is_stale || !only_stale)
            {
                let path = entry.paths.remove(at);
                Self::forget(&mut self.usage, net, &path);
                self.dirty.insert(*net);
                removed += 1;
            }
        }
        removed
    }

    /// Removes all that is known of a peer.
    pub(crate) fn remove_peer(&mut self, peer: PeerId) {
        for family in Family::ALL {
            self.remove_routes(peer, family, false);
        }
        self.usage.remove(&peer);
        self.senders.remove(&peer);
    }

    /// Imports the routes of a peer anew.
    pub(crate) fn reimport(&mut self, peer: PeerId, import: &mut Import<'_>) {
        for (net, entry) in &mut self.table {
            let at = entry
                .paths
                .binary_search_by_key(&Source::Peer(peer), |path| path.source);
            let Ok(at) = at else { continue };
            let path = &mut entry.paths[at];
            let interface = interface_of(&self.next_hops, &path.received);
            let imported = import(&mut self.store, net, &path.received, interface);
            let (accepted, priority) =
                imported.map_or((None, 0), |(each, priority)| (Some(each), priority));
            if (&accepted, priority) != (&path.accepted, path.priority) {
                (path.accepted, path.priority) = (accepted, priority);
                self.dirty.insert(*net);
            }
        }
    }

    fn touch_peer(&mut self, peer: PeerId) {
        let has = |entry: &Entry| {
            entry
                .paths
                .iter()
                .any(|path| path.source == Source::Peer(peer))
        };
        let nets = self
            .table
            .iter()
            .filter(|(_, entry)| has(entry))
            .map(|(net, _)| *net);
        self.dirty.extend(nets);
    }

    /// Notes the way to a next hop, or that there is none, or that it is not known any more.
    /// Returns whether that changes anything.
    pub(crate) fn set_next_hop(
        &mut self,
        address: IpAddr,
        info: Option<Option<NextHopInfo>>,
    ) -> bool {
        let former = match info.clone() {
            Some(info) => self.next_hops.insert(address, info),
            None => self.next_hops.remove(&address),
        };
        if former == info {
            return false;
        }
        let leads = |path: &Path| path.received.next_hop.address == address;
        let nets = self
            .table
            .iter()
            .filter(|(_, entry)| entry.paths.iter().any(leads));
        self.dirty.extend(nets.map(|(net, _)| *net));
        true
    }

    /// Gateway to a next hop.
    pub(crate) fn gateway(&self, next_hop: IpAddr) -> Option<IpAddr> {
        self.next_hops.get(&next_hop)?.as_ref()?.gateway
    }

    /// Interface of the way to the next hop.
    pub(crate) fn interface(&self, attributes: &Attributes) -> Option<&str> {
        interface_of(&self.next_hops, attributes)
    }

    /// Everything is selected anew.
    pub(crate) fn touch_all(&mut self) {
        self.dirty.extend(self.table.keys());
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Selects again where something has changed, for families that `is_ready`. Returns what
    /// changes in the kernel, and the prefixes of which the announced path is another one.
    pub(crate) fn flush(
        &mut self,
        selection: Selection<'_>,
        is_ready: &dyn Fn(Family) -> bool,
    ) -> (Vec<RouteChange>, Vec<IpNet>) {
        let (mut changes, mut announced) = (Vec::new(), Vec::new());
        let (ready, waiting) = std::mem::take(&mut self.dirty)
            .into_iter()
            .partition(|net| is_ready(Family::of(net)));
        self.dirty = waiting;
        let ready: BTreeSet<IpNet> = ready;
        for net in ready {
            let Some(entry) = self.table.get(&net) else {
                continue;
            };
            let (best, route) = self.choose(entry, &net, selection);
            let route = route.map(|route| self.share(route));
            let Some(entry) = self.table.get_mut(&net) else {
                continue;
            };
            if entry.best != best {
                entry.best = best;
                announced.push(net);
            }
            if entry.installed != route {
                changes.push(match &route {
                    Some(route) => RouteChange::Set {
                        net,
                        route: route.clone(),
                    },
                    None => RouteChange::Remove { net },
                });
                entry.installed = route;
            }
            if entry.paths.is_empty() {
                self.table.remove(&net);
            }
        }
        (changes, announced)
    }

    fn choose(
        &self,
        entry: &Entry,
        net: &IpNet,
        selection: Selection<'_>,
    ) -> (Option<Best>, Option<KernelRoute>) {
        let contenders: Vec<(&Path, Contender<'_>)> = entry
            .paths
            .iter()
            .filter_map(|path| Some((path, self.contender(path, selection)?)))
            .collect();
        let list: Vec<Contender<'_>> = contenders.iter().map(|(_, contender)| *contender).collect();
        let chosen = select(&list);
        let Some(first) = chosen.first().map(|index| contenders[*index].0) else {
            return (None, None);
        };
        let best = first.accepted.as_ref().map(|attributes| Best {
            source: first.source,
            attributes: attributes.clone(),
            priority: first.priority,
        });
        if first.source == Source::Local || !(selection.installs)(net) {
            return (best, None);
        }
        let mut next_hops: Vec<NextHop> = Vec::new();
        for index in chosen {
            let hop = contenders[index].1.attributes.next_hop;
            if next_hops.len() < selection.max_paths && !next_hops.contains(&hop) {
                next_hops.push(hop);
            }
        }
        next_hops.sort();
        (
            best,
            Some(KernelRoute {
                next_hops,
                priority: first.priority,
            }),
        )
    }

    fn contender<'a>(&self, path: &'a Path, selection: Selection<'_>) -> Option<Contender<'a>> {
        let attributes: &Attributes = path.accepted.as_deref()?;
        let Source::Peer(peer) = path.source else {
            return Some(Contender {
                attributes,
                sender: None,
                metric: 0,
            });
        };
        let sender = Some(*self.senders.get(&peer)?);
        let address = attributes.next_hop.address;
        let metric = match self.next_hops.get(&address) {
            Some(info) => info.as_ref()?.metric,
            // FRR without an IPv6 address sends an IPv4-mapped one, by which no kernel routes.
            None if matches!(address, IpAddr::V6(each) if each.to_ipv4_mapped().is_some()) => {
                return None;
            }
            None if selection.assume_reachable => 0,
            None => return None,
        };
        Some(Contender {
            attributes,
            sender,
            metric,
        })
    }

    /// The value of the route before, if it is the same: most routes of a table are.
    fn share(&mut self, route: KernelRoute) -> Arc<KernelRoute> {
        match &self.latest {
            Some(latest) if **latest == route => latest.clone(),
            _ => {
                let shared = Arc::new(route);
                self.latest = Some(shared.clone());
                shared
            }
        }
    }

    /// The chosen path of a prefix.
    pub(crate) fn best(&self, net: &IpNet) -> Option<&Best> {
        self.table.get(net)?.best.as_ref()
    }

    /// Prefixes of a family that have a chosen path.
    pub(crate) fn announced(&self, family: Family) -> impl Iterator<Item = IpNet> + '_ {
        let of_family = self
            .table
            .iter()
            .filter(move |(net, _)| Family::of(net) == family);
        of_family
            .filter(|(_, entry)| entry.best.is_some())
            .map(|(net, _)| *net)
    }

    /// Routes of the kernel, in order.
    pub(crate) fn installed(&self) -> impl Iterator<Item = (IpNet, &Arc<KernelRoute>)> {
        self.table
            .iter()
            .filter_map(|(net, entry)| Some((*net, entry.installed.as_ref()?)))
    }

    /// Next hops of all routes.
    pub(crate) fn wanted_next_hops(&self) -> BTreeSet<IpAddr> {
        let paths = self.table.values().flat_map(|entry| &entry.paths);
        let of_peers = paths.filter(|path| path.source != Source::Local);
        of_peers
            .map(|path| path.received.next_hop.address)
            .collect()
    }

    /// BGP identifier of a peer.
    pub(crate) fn router_id(&self, peer: PeerId) -> Option<std::net::Ipv4Addr> {
        self.senders.get(&peer).map(|sender| sender.router_id)
    }

    pub(crate) fn usage(&self, peer: PeerId) -> Usage {
        self.usage.get(&peer).copied().unwrap_or_default()
    }
}

fn interface_of<'a>(
    next_hops: &'a BTreeMap<IpAddr, Option<NextHopInfo>>,
    attributes: &Attributes,
) -> Option<&'a str> {
    next_hops
        .get(&attributes.next_hop.address)?
        .as_ref()?
        .interface
        .as_deref()
}
