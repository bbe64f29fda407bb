//! Finds overlapping blocks. They are reported and not repaired, because a person must decide which
//! pods move. Margay never creates any; a cluster that is taken over may have some.

use margay_api::ipam::block::Block;

/// Returns one text for each pair of overlapping blocks, in order: both blocks with their nodes,
/// the consequence and the remedy.
pub fn overlaps<'a>(blocks: impl IntoIterator<Item = &'a Block>) -> Vec<String> {
    let mut ordered: Vec<&Block> = blocks.into_iter().filter(|block| !block.spec().deleted).collect();
    ordered.sort_by_key(|block| (block.cidr().network(), block.cidr().prefix_len()));
    let mut texts = Vec::new();
    // Ranges are nested or disjoint, so those that may contain the next one form a stack.
    let mut around: Vec<&Block> = Vec::new();
    for block in ordered {
        while around.last().is_some_and(|outer| !outer.cidr().contains(&block.cidr())) {
            around.pop();
        }
        texts.extend(around.iter().map(|outer| text(outer, block)));
        around.push(block);
    }
    texts
}

fn text(outer: &Block, inner: &Block) -> String {
    let named = |block: &Block| {
        let node = block.node().map_or_else(|| "of no node".to_owned(), |node| format!("of node {node}"));
        format!("{} {node} ({} addresses in use)", block.cidr(), block.allocated().count())
    };
    format!(
        "IPAMBlock {} lies in IPAMBlock {}: an address can be assigned twice, and routes of the larger one lead to the node of the smaller one; recreate the \
         pods of one of the two elsewhere, then delete its IPAMBlock and BlockAffinity",
        named(inner),
        named(outer)
    )
}

#[cfg(test)]
mod tests {
    use margay_api::v3::ipam::AllocationAttribute;

    use super::*;

    fn block(cidr: &str, node: &str) -> Block {
        Block::new(cidr.parse().unwrap(), node, String::new())
    }

    #[test]
    fn overlapping_blocks_are_reported_with_their_nodes() {
        let mut taken = block("10.244.82.192/28", "n1");
        taken.assign(&AllocationAttribute::default(), |_| false).unwrap();
        let blocks = [
            taken,
            block("10.244.82.192/26", "n2"),
            block("10.244.83.0/26", "n2"),
            block("10.244.82.240/28", "n3"),
            block("fd00::/122", "n1"),
        ];
        let texts = overlaps(&blocks);
        assert_eq!(texts.len(), 2, "{texts:#?}");
        let first = "IPAMBlock 10.244.82.192/28 of node n1 (1 addresses in use) lies in IPAMBlock 10.244.82.192/26 of node n2 (0 addresses in use): ";
        assert!(texts[0].starts_with(first), "{}", texts[0]);
        assert!(texts[1].starts_with("IPAMBlock 10.244.82.240/28 of node n3"), "{}", texts[1]);
    }

    #[test]
    fn a_block_that_is_being_deleted_is_ignored() {
        let mut spec = block("10.0.0.0/24", "n1").spec().clone();
        spec.deleted = true;
        assert_eq!(overlaps(&[Block::parse(spec).unwrap(), block("10.0.0.0/26", "n2")]), [""; 0]);
    }
}
