//! Arithmetic on one IPAM block: assign, release, look up. Pure: a change takes effect only when
//! the block has been written at an unchanged resourceVersion.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::v3::ipam::{AllocationAttribute, IPAMBlockSpec};

/// Reasons why a stored block cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// `cidr` does not parse.
    #[error("block range {0:?}: must be a range like 10.0.0.0/26")]
    Cidr(String),
    /// The object's name is not that of its range.
    #[error(
        "block {name:?}: the name of its range is {wanted:?}; find out what created it and delete \
         it"
    )]
    Name {
        /// Name of the object.
        name: String,
        /// Name of a block of that range.
        wanted: String,
    },
    /// The length of `allocations` is not the size of the range.
    #[error(
        "block {cidr}: {found} allocations, must be {wanted}, one for each address of the range"
    )]
    Size {
        /// Range of the block.
        cidr: IpNet,
        /// Entries in `allocations`.
        found: usize,
        /// Addresses in the range.
        wanted: usize,
    },
    /// The free list and the allocations contradict each other: assigning from it could give an
    /// address twice.
    #[error(
        "block {cidr}: ordinal {ordinal} in the free list is not free, not in the range, or there \
         twice"
    )]
    Free {
        /// Range of the block.
        cidr: IpNet,
        /// The ordinal.
        ordinal: u32,
    },
    /// An allocation points to an attribute that is not there.
    #[error("block {cidr}: ordinal {ordinal} points to attribute {index}, which does not exist")]
    Attribute {
        /// Range of the block.
        cidr: IpNet,
        /// The address's ordinal.
        ordinal: usize,
        /// The missing index.
        index: u32,
    },
}

/// A block whose lists are consistent with its range.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    cidr: IpNet,
    spec: IPAMBlockSpec,
}

impl Block {
    /// Creates a block of a node with all addresses free, in Calico's form. `claimed` is the time
    /// in RFC 3339.
    pub fn new(cidr: IpNet, node: &str, claimed: String) -> Self {
        let size = size(cidr);
        let spec = IPAMBlockSpec {
            cidr: cidr.to_string(),
            affinity: Some(format!("host:{node}")),
            affinity_claim_time: Some(claimed),
            allocations: vec![None; size],
            unallocated: (0..size as u32).collect(),
            ..IPAMBlockSpec::default()
        };
        Self { cidr, spec }
    }

    /// Checks a stored block.
    pub fn parse(spec: IPAMBlockSpec) -> Result<Self, BlockError> {
        let cidr: IpNet = spec
            .cidr
            .parse()
            .map_err(|_| BlockError::Cidr(spec.cidr.clone()))?;
        let wanted = size(cidr);
        if spec.allocations.len() != wanted {
            return Err(BlockError::Size {
                cidr,
                found: spec.allocations.len(),
                wanted,
            });
        }
        let lost = |(ordinal, index): (usize, &Option<u32>)| {
            index
                .filter(|index| *index as usize >= spec.attributes.len())
                .map(|index| (ordinal, index))
        };
        if let Some((ordinal, index)) = spec.allocations.iter().enumerate().find_map(lost) {
            return Err(BlockError::Attribute {
                cidr,
                ordinal,
                index,
            });
        }
        let mut seen = BTreeSet::new();
        for ordinal in &spec.unallocated {
            let is_free = spec.allocations.get(*ordinal as usize) == Some(&None);
            if !is_free || !seen.insert(*ordinal) {
                return Err(BlockError::Free {
                    cidr,
                    ordinal: *ordinal,
                });
            }
        }
        Ok(Self { cidr, spec })
    }

    /// Returns the stored form.
    pub fn spec(&self) -> &IPAMBlockSpec {
        &self.spec
    }

    /// Range of the block.
    pub fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// Node that owns the block, unless it is being deleted.
    pub fn node(&self) -> Option<&str> {
        self.spec
            .affinity
            .as_deref()?
            .strip_prefix("host:")
            .filter(|_| !self.spec.deleted)
    }

    /// Number of free addresses.
    pub fn free(&self) -> usize {
        self.spec.unallocated.len()
    }

    /// Number of free addresses that are not reserved, which [`Self::assign`] can give.
    pub fn available(&self, is_reserved: impl Fn(IpAddr) -> bool) -> usize {
        self.spec
            .unallocated
            .iter()
            .filter(|ordinal| !is_reserved(self.address(**ordinal as usize)))
            .count()
    }

    /// Returns the addresses of a handle, in order.
    pub fn of_handle(&self, handle: &str) -> Vec<IpAddr> {
        self.ordinals_of(handle)
            .into_iter()
            .map(|ordinal| self.address(ordinal))
            .collect()
    }

    /// Returns every allocated address with its attributes, in order, including those in cooldown.
    pub fn allocated(&self) -> impl Iterator<Item = (IpAddr, &AllocationAttribute)> {
        self.spec
            .allocations
            .iter()
            .enumerate()
            .filter_map(|(ordinal, index)| {
                Some((
                    self.address(ordinal),
                    &self.spec.attributes[(*index)? as usize],
                ))
            })
    }

    /// Assigns the address that has been free for longest and is not reserved. `None`: there is
    /// none.
    pub fn assign(
        &mut self,
        attribute: &AllocationAttribute,
        is_reserved: impl Fn(IpAddr) -> bool,
    ) -> Option<IpAddr> {
        let position = self
            .spec
            .unallocated
            .iter()
            .position(|ordinal| !is_reserved(self.address(*ordinal as usize)))?;
        Some(self.assign_position(position, attribute))
    }

    /// Assigns a given address. False: it is not free, or not in this block.
    pub fn assign_address(&mut self, address: IpAddr, attribute: &AllocationAttribute) -> bool {
        let position = self
            .spec
            .unallocated
            .iter()
            .position(|ordinal| self.address(*ordinal as usize) == address);
        position
            .map(|position| self.assign_position(position, attribute))
            .is_some()
    }

    fn assign_position(&mut self, position: usize, attribute: &AllocationAttribute) -> IpAddr {
        let ordinal = self.spec.unallocated.remove(position) as usize;
        let index = self.find_or_add_attribute(attribute);
        self.spec.allocations[ordinal] = Some(index);
        self.bump_sequence();
        self.spec
            .sequence_number_for_allocation
            .insert(ordinal.to_string(), self.spec.sequence_number);
        self.address(ordinal)
    }

    /// Sequence number that tells this allocation of an address from earlier and later ones; blocks
    /// of older Calico versions have none.
    pub fn sequence(&self, address: IpAddr) -> Option<u64> {
        let ordinal = self.ordinal(address)?;
        let numbers = &self.spec.sequence_number_for_allocation;
        numbers.get(&ordinal.to_string()).copied()
    }

    /// Releases one address if its allocation still has that sequence number. A later allocation of
    /// the same address stays.
    pub fn release_address(&mut self, address: IpAddr, sequence: Option<u64>) -> bool {
        let Some(ordinal) = self.ordinal(address) else {
            return false;
        };
        if self.spec.allocations[ordinal].is_none() || self.sequence(address) != sequence {
            return false;
        }
        self.free_ordinals(&[ordinal]);
        true
    }

    /// Releases all addresses of a handle and returns them. They go to the end of the free list.
    pub fn release(&mut self, handle: &str) -> Vec<IpAddr> {
        let ordinals = self.ordinals_of(handle);
        self.free_ordinals(&ordinals);
        ordinals
            .into_iter()
            .map(|ordinal| self.address(ordinal))
            .collect()
    }

    /// Starts the cooldown of all addresses of a handle: they stay allocated, with the time of
    /// their release as the only attribute, as Calico writes them for `ipCooldownSeconds`. Returns
    /// the addresses.
    pub fn start_cooldown(&mut self, handle: &str, released_at: &str) -> Vec<IpAddr> {
        let ordinals = self.ordinals_of(handle);
        let resting = AllocationAttribute {
            released_at: Some(released_at.to_owned()),
            ..AllocationAttribute::default()
        };
        for ordinal in &ordinals {
            self.spec.allocations[*ordinal] = Some(self.find_or_add_attribute(&resting));
        }
        if !ordinals.is_empty() {
            self.drop_unused_attributes();
            self.bump_sequence();
        }
        ordinals
            .into_iter()
            .map(|ordinal| self.address(ordinal))
            .collect()
    }

    /// Returns the addresses in cooldown with the times of their release, in order.
    pub fn cooling_down(&self) -> impl Iterator<Item = (IpAddr, &str)> {
        self.allocated()
            .filter_map(|(address, attribute)| Some((address, attribute.released_at.as_deref()?)))
    }

    /// Frees the addresses whose cooldown is over, as `is_over` decides from the time of their
    /// release. Returns the addresses.
    pub fn end_cooldown(&mut self, is_over: impl Fn(&str) -> bool) -> Vec<IpAddr> {
        let mut over: Vec<(&str, usize)> = self
            .spec
            .allocations
            .iter()
            .enumerate()
            .filter_map(|(ordinal, index)| Some((self.released_at((*index)?)?, ordinal)))
            .filter(|(released_at, _)| is_over(released_at))
            .collect();
        // First released, first assigned again.
        over.sort_unstable();
        let ordinals: Vec<usize> = over.into_iter().map(|(_, ordinal)| ordinal).collect();
        self.free_ordinals(&ordinals);
        ordinals
            .into_iter()
            .map(|ordinal| self.address(ordinal))
            .collect()
    }

    /// Assigns an allocated address to another owner in one step. False: it is not allocated.
    pub fn reassign(&mut self, address: IpAddr, attribute: &AllocationAttribute) -> bool {
        let Some(ordinal) = self
            .ordinal(address)
            .filter(|ordinal| self.spec.allocations[*ordinal].is_some())
        else {
            return false;
        };
        let index = self.find_or_add_attribute(attribute);
        self.spec.allocations[ordinal] = Some(index);
        self.drop_unused_attributes();
        self.bump_sequence();
        self.spec
            .sequence_number_for_allocation
            .insert(ordinal.to_string(), self.spec.sequence_number);
        true
    }

    fn released_at(&self, index: u32) -> Option<&str> {
        self.spec.attributes[index as usize].released_at.as_deref()
    }

    fn free_ordinals(&mut self, ordinals: &[usize]) {
        for ordinal in ordinals {
            self.spec.allocations[*ordinal] = None;
            self.spec.unallocated.push(*ordinal as u32);
            self.spec
                .sequence_number_for_allocation
                .remove(&ordinal.to_string());
        }
        if !ordinals.is_empty() {
            self.drop_unused_attributes();
            self.bump_sequence();
        }
    }

    fn ordinal(&self, address: IpAddr) -> Option<usize> {
        (0..self.spec.allocations.len()).find(|ordinal| self.address(*ordinal) == address)
    }

    fn bump_sequence(&mut self) {
        self.spec.sequence_number += 1;
    }

    fn ordinals_of(&self, handle: &str) -> Vec<usize> {
        let has = |index: &Option<u32>| {
            index.is_some_and(|index| {
                self.spec.attributes[index as usize].handle_id.as_deref() == Some(handle)
            })
        };
        self.spec
            .allocations
            .iter()
            .enumerate()
            .filter(|(_, index)| has(index))
            .map(|(ordinal, _)| ordinal)
            .collect()
    }

    fn find_or_add_attribute(&mut self, attribute: &AllocationAttribute) -> u32 {
        let found = self
            .spec
            .attributes
            .iter()
            .position(|present| present == attribute);
        let index = found.unwrap_or_else(|| {
            self.spec.attributes.push(attribute.clone());
            self.spec.attributes.len() - 1
        });
        index as u32
    }

    fn drop_unused_attributes(&mut self) {
        let mut moved = BTreeMap::new();
        let mut kept = Vec::new();
        for index in self.spec.allocations.iter().flatten() {
            moved.entry(*index).or_insert_with(|| {
                kept.push(self.spec.attributes[*index as usize].clone());
                (kept.len() - 1) as u32
            });
        }
        for index in self.spec.allocations.iter_mut().flatten() {
            *index = moved[index];
        }
        self.spec.attributes = kept;
    }

    fn address(&self, ordinal: usize) -> IpAddr {
        match self.cidr.network() {
            IpAddr::V4(first) => IpAddr::V4((u32::from(first) + ordinal as u32).into()),
            IpAddr::V6(first) => IpAddr::V6((u128::from(first) + ordinal as u128).into()),
        }
    }
}

/// Number of addresses of a range, at most 4096.
fn size(cidr: IpNet) -> usize {
    1 << (cidr.max_prefix_len() - cidr.prefix_len()).min(12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn attribute(handle: &str) -> AllocationAttribute {
        AllocationAttribute {
            handle_id: Some(handle.to_owned()),
            ..AllocationAttribute::default()
        }
    }

    fn mk_block(cidr: &str) -> Block {
        Block::new(
            cidr.parse().expect("a range"),
            "n1",
            "2026-01-01T00:00:00Z".to_owned(),
        )
    }

    #[test]
    fn the_stored_form_is_calicos() {
        let mut block = mk_block("10.0.0.0/30");
        block.assign(&attribute("h1"), |_| false);
        block.assign(&attribute("h2"), |_| false);
        block.release("h1");
        expect_test::expect![[r#"{"cidr":"10.0.0.0/30","affinity":"host:n1","affinityClaimTime":"2026-01-01T00:00:00Z","allocations":[null,0,null,null],"unallocated":[2,3,0],"attributes":[{"handle_id":"h2"}],"sequenceNumber":3,"sequenceNumberForAllocation":{"1":2},"strictAffinity":false,"deleted":false}"#]]
        .assert_eq(&serde_json::to_string(block.spec()).expect("JSON"));
    }

    #[test]
    fn unsound_blocks_are_refused_with_the_reason() {
        let sound = mk_block("10.0.0.0/30").spec().clone();
        let error = |spec| Block::parse(spec).err().map(|error| error.to_string());
        assert_eq!(error(sound.clone()), None);
        let short = IPAMBlockSpec {
            allocations: vec![None; 3],
            ..sound.clone()
        };
        assert_eq!(
            error(short),
            Some(
                "block 10.0.0.0/30: 3 allocations, must be 4, one for each address of the range"
                    .to_owned()
            )
        );
        let lost = IPAMBlockSpec {
            allocations: vec![Some(0), None, None, None],
            ..sound
        };
        assert_eq!(
            error(lost),
            Some(
                "block 10.0.0.0/30: ordinal 0 points to attribute 0, which does not exist"
                    .to_owned()
            )
        );
    }

    #[test]
    fn a_free_list_that_could_give_an_address_twice_is_refused() {
        let mut block = mk_block("10.0.0.0/30");
        block.assign(&attribute("h1"), |_| false);
        for free in [vec![0, 1], vec![1, 1], vec![4]] {
            let spec = IPAMBlockSpec {
                unallocated: free.clone(),
                ..block.spec().clone()
            };
            assert!(
                matches!(Block::parse(spec), Err(BlockError::Free { .. })),
                "{free:?}"
            );
        }
    }

    #[test]
    fn an_address_that_was_given_again_is_not_released() {
        let mut block = mk_block("10.0.0.0/30");
        let address: IpAddr = "10.0.0.2".parse().expect("an address");
        assert!(block.assign_address(address, &attribute("old")));
        assert!(!block.assign_address(address, &attribute("other")));
        let seen = block.sequence(address);
        block.release("old");
        assert!(block.assign_address(address, &attribute("new")));
        assert!(!block.release_address(address, seen));
        assert!(!block.release_address(address, None));
        assert_eq!(block.of_handle("new"), [address]);
        assert!(block.release_address(address, block.sequence(address)));
        assert!(!block.release_address(address, None));
        assert_eq!(block.free(), 4);
        assert!(!block.assign_address("10.0.0.4".parse().expect("an address"), &attribute("x")));
    }

    #[test]
    fn an_address_in_cooldown_has_no_owner_and_is_not_assigned_before_its_end() {
        let mut block = mk_block("10.0.0.0/30");
        for number in 0..4 {
            block.assign(&attribute(&format!("h{number}")), |_| false);
        }
        let released = block.start_cooldown("h1", "2026-01-01T00:00:01Z");
        block.start_cooldown("h2", "2026-01-01T00:00:00Z");
        assert_eq!(
            released,
            block
                .cooling_down()
                .map(|(address, _)| address)
                .take(1)
                .collect::<Vec<_>>()
        );
        assert_eq!(
            (
                block.free(),
                block.of_handle("h1").len(),
                block.allocated().count()
            ),
            (0, 0, 4)
        );
        assert_eq!(
            block.start_cooldown("h1", "2026-01-01T00:00:09Z"),
            [] as [IpAddr; 0],
            "once is enough"
        );
        assert!(!block.assign_address(released[0], &attribute("x")));
        assert_eq!(block.assign(&attribute("x"), |_| false), None);
        assert_eq!(Block::parse(block.spec().clone()).as_ref(), Ok(&block));
        assert_eq!(
            block.end_cooldown(|since| since < "2026"),
            [] as [IpAddr; 0]
        );
        let freed: Vec<String> = block
            .end_cooldown(|_| true)
            .iter()
            .map(IpAddr::to_string)
            .collect();
        assert_eq!(
            freed,
            ["10.0.0.2", "10.0.0.1"],
            "the first that was released is the first to be given"
        );
        assert_eq!(block.spec().unallocated, [2, 1]);
        assert_eq!(block.spec().sequence_number_for_allocation.len(), 2);
        assert_eq!(Block::parse(block.spec().clone()).as_ref(), Ok(&block));
    }

    #[test]
    fn an_address_changes_hands_in_one_step() {
        let mut block = mk_block("10.0.0.0/30");
        let address = block.assign(&attribute("old"), |_| false).expect("room");
        let before = block.sequence(address);
        assert!(block.reassign(address, &attribute("new")));
        assert_eq!(
            (block.of_handle("old"), block.of_handle("new")),
            (vec![], vec![address])
        );
        assert!(
            !block.release_address(address, before),
            "the former sequence number releases nothing"
        );
        assert!(!block.reassign("10.0.0.3".parse().expect("an address"), &attribute("new")));
    }

    proptest! {
        #[test]
        fn no_address_twice_and_none_lost(
            ops in proptest::collection::vec((any::<bool>(), 0u8..12), 0..200),
        ) {
            let mut block = mk_block("10.0.0.0/28");
            let mut held: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
            let reserved: IpAddr = "10.0.0.3".parse().expect("an address");
            for (assign, number) in ops {
                let handle = format!("h{number}");
                if assign {
                    let taken: usize = held.values().map(BTreeSet::len).sum();
                    match block.assign(&attribute(&handle), |address| address == reserved) {
                        Some(address) => {
                            prop_assert!(
                                held.values().all(|addresses| !addresses.contains(&address))
                            );
                            prop_assert_ne!(address, reserved);
                            held.entry(handle).or_default().insert(address);
                        }
                        None => prop_assert_eq!(taken, 15),
                    }
                } else {
                    let released: BTreeSet<IpAddr> = block.release(&handle).into_iter().collect();
                    prop_assert_eq!(released, held.remove(&handle).unwrap_or_default());
                }
                let taken: usize = held.values().map(BTreeSet::len).sum();
                prop_assert_eq!(block.free() + taken, 16);
                prop_assert_eq!(block.available(|address| address == reserved) + taken, 15);
                prop_assert_eq!(&Block::parse(block.spec().clone()), &Ok(block.clone()));
            }
        }
    }
}
