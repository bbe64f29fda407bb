//! Restricts what an agent may write of IPAM: blocks, affinities and handles of its own node, and
//! borrowed addresses in blocks of others.
//!
//! Attributes of a block are renumbered when one is released, so allocations are compared by the
//! attributes that they refer to. CEL has no ranges of numbers: the ordinals of a block are
//! iterated as rows of [`ROW`] numbers.

use margay_api::ipam::names::ANNOTATION_HANDLE_NODE;

use super::{Guard, STRICT};

/// Ordinals per row.
const ROW: usize = 64;
/// Number of addresses of the largest block that a pool may have.
const LARGEST: usize = 4096;
/// Maximum increase of a block's sequence number by one write: far more than a write has changes,
/// and far less than what is left of 63 bits.
const STEP: usize = 65_536;

/// Name of a block, derived from its range.
const BLOCK_NAME: &str = "object.spec.cidr.replace('.', '-').replace(':', '-').replace('/', '-')";

/// Returns a list of a block, which programs leave out, or store as null, when it is empty.
fn list(of: &str, field: &str) -> String {
    format!("has({of}.spec.{field}) && dyn({of}.spec.{field}) != null ? {of}.spec.{field} : []")
}

/// Returns a condition for each ordinal `o` of the block before the request.
fn each_ordinal(holds: &str) -> String {
    format!(
        "variables.rows.all(r, r >= size(variables.allocationsBefore) || variables.columns.all(c, \
         [r + c].all(o, o >= size(variables.allocationsBefore) || {holds})))"
    )
}

/// The allocation of ordinal `o` is unchanged.
const SAME: &str = "(dyn(variables.allocationsBefore[o]) == null ? dyn(variables.allocations[o]) \
                    == null : dyn(variables.allocations[o]) != null && \
                    variables.attributesBefore[variables.allocationsBefore[o]] == \
                    variables.attributes[variables.allocations[o]])";

/// Node of an attribute `a`.
const NODE_OF: &str = "has(a.secondary) && dyn(a.secondary) != null && 'node' in a.secondary ? \
                       a.secondary['node'] : ''";

/// Rules for affinities.
pub(super) fn affinities() -> Guard {
    Guard::new(
        "margay-node-blockaffinities",
        "blockaffinities",
        &["CREATE", "UPDATE", "DELETE"],
    )
    .rules(vec![
        (
            "(request.operation == 'DELETE' || object.spec.node == variables.node) && \
             (request.operation == 'CREATE' || oldObject.spec.node == variables.node)"
                .to_owned(),
            "an agent writes BlockAffinities of its own node only",
        ),
        (
            // A long name is cut and has a hash, which CEL cannot compute.
            format!(
                "request.operation == 'DELETE' || object.metadata.name == variables.node + '-' + \
                 {BLOCK_NAME} || size(variables.node) + size(object.spec.cidr) > 240"
            ),
            "a BlockAffinity is named after its node and range",
        ),
        (
            "request.operation != 'UPDATE' || object.spec.cidr == oldObject.spec.cidr".to_owned(),
            "a BlockAffinity keeps its range",
        ),
    ])
}

/// Rules for blocks.
pub(super) fn blocks() -> Guard {
    Guard::new(
        "margay-node-ipamblocks",
        "ipamblocks",
        &["CREATE", "UPDATE", "DELETE"],
    )
    .variables(block_variables())
    .rules(
        [
            whole_block_rules(),
            allocation_rules(),
            foreign_block_rules(),
        ]
        .concat(),
    )
}

/// Rules for blocks under `strictAffinity`, which is a parameter.
pub(super) fn strict() -> Guard {
    let taken =
        "dyn(variables.allocationsBefore[o]) != null || dyn(variables.allocations[o]) == null";
    Guard::new(STRICT, "ipamblocks", &["UPDATE"])
        .variables(block_variables())
        .rules(vec![(
            format!(
                "!has(params.spec.strictAffinity) || !params.spec.strictAffinity || \
                 variables.isOwn || {}",
                each_ordinal(taken)
            ),
            "IPAMConfiguration default has strictAffinity: an agent borrows no addresses from \
             another node's block",
        )])
}

fn block_variables() -> Vec<(&'static str, String)> {
    let before = |text: String| format!("request.operation == 'CREATE' ? [] : {text}");
    let after = |text: String| format!("request.operation == 'DELETE' ? [] : {text}");
    let numbers = |step: usize, end: usize| {
        let numbers: Vec<String> = (0..end)
            .step_by(step)
            .map(|number| number.to_string())
            .collect();
        format!("[{}]", numbers.join(","))
    };
    let own = |text: &str| format!("{text} in ['', 'host:' + variables.node]");
    vec![
        (
            "before",
            "request.operation == 'CREATE' || !has(oldObject.spec.affinity) ? '' : \
             oldObject.spec.affinity"
                .into(),
        ),
        (
            "after",
            "request.operation == 'DELETE' || !has(object.spec.affinity) ? '' : \
             object.spec.affinity"
                .into(),
        ),
        (
            "isOwn",
            format!("{} && {}", own("variables.before"), own("variables.after")),
        ),
        (
            "allocationsBefore",
            before("oldObject.spec.allocations".into()),
        ),
        ("allocations", after("object.spec.allocations".into())),
        ("attributesBefore", before(list("oldObject", "attributes"))),
        ("attributes", after(list("object", "attributes"))),
        (
            "unallocatedBefore",
            before(list("oldObject", "unallocated")),
        ),
        ("unallocated", after(list("object", "unallocated"))),
        // Attributes that may be removed: those of the agent's node; and in its own block also
        // those without a node, and those in cooldown.
        (
            "mayGo",
            format!(
                "variables.attributesBefore.map(a, ({NODE_OF}) == variables.node || \
                 variables.isOwn && (({NODE_OF}) == '' || has(a.releasedAt) && dyn(a.releasedAt) \
                 != null))"
            ),
        ),
        // Attributes that may be added: those of the agent's node, and those that go into cooldown.
        (
            "mayCome",
            format!(
                "variables.attributes.map(a, ({NODE_OF}) == variables.node || ({NODE_OF}) == '' && \
                 has(a.releasedAt) && dyn(a.releasedAt) != null)"
            ),
        ),
        ("rows", numbers(ROW, LARGEST)),
        ("columns", numbers(1, ROW)),
    ]
}

/// Rules for a block as a whole: owner, name and range.
fn whole_block_rules() -> Vec<(String, &'static str)> {
    vec![
        (
            "variables.isOwn || (request.operation == 'UPDATE' && variables.before == \
             variables.after)".to_owned(),
            "an agent claims, releases and deletes blocks of its own node only",
        ),
        (
            format!("request.operation == 'DELETE' || object.metadata.name == {BLOCK_NAME}"),
            "a block is named after its range",
        ),
        (
            "request.operation != 'UPDATE' || (object.spec.cidr == oldObject.spec.cidr && \
             size(variables.allocations) == size(variables.allocationsBefore))"
                .to_owned(),
            "a block keeps its range",
        ),
        (
            "request.operation == 'DELETE' || !has(object.spec.deleted) || !object.spec.deleted || \
             (request.operation == 'UPDATE' && variables.isOwn && variables.allocations.all(a, \
             dyn(a) == null))".to_owned(),
            "an agent marks blocks of its own node as deleted, once none of their addresses is \
             allocated",
        ),
    ]
}

/// Rules for allocations.
fn allocation_rules() -> Vec<(String, &'static str)> {
    let changed = "(dyn(variables.allocationsBefore[o]) == null || \
                   variables.mayGo[variables.allocationsBefore[o]]) && \
                   (dyn(variables.allocations[o]) == null || \
                   variables.mayCome[variables.allocations[o]])";
    vec![
        (
            // Usually the whole block is the node's own, and no allocation needs to be compared.
            format!(
                "request.operation != 'UPDATE' || (variables.mayGo.all(may, may) && \
                 variables.mayCome.all(may, may)) || {}",
                each_ordinal(&format!("{SAME} || ({changed})"))
            ),
            "an agent assigns addresses to its own node, and releases those of its own node only",
        ),
        (
            "request.operation != 'CREATE' || variables.allocations.all(a, dyn(a) == null || \
             variables.mayCome[a])"
                .to_owned(),
            "a new block has addresses of the agent's own node only",
        ),
        (
            "request.operation != 'DELETE' || variables.allocationsBefore.all(a, dyn(a) == null || \
             variables.mayGo[a])"
                .to_owned(),
            "an agent deletes no block in which another node has an address",
        ),
    ]
}

/// Rules for blocks of other nodes: what an agent that borrows must leave unchanged, so that the
/// owner can work with the block.
fn foreign_block_rules() -> Vec<(String, &'static str)> {
    let foreign =
        |rule: &str| format!("request.operation != 'UPDATE' || variables.isOwn || ({rule})");
    let same = |field: &str| {
        format!(
            "(has(object.spec.{field}) ? [dyn(object.spec.{field})] : []) == \
             (has(oldObject.spec.{field}) ? [dyn(oldObject.spec.{field})] : [])"
        )
    };
    let number =
        |of: &str| format!("(has({of}.spec.sequenceNumber) ? {of}.spec.sequenceNumber : 0)");
    let numbers = |of: &str| {
        format!(
            "(has({of}.spec.sequenceNumberForAllocation) && \
             dyn({of}.spec.sequenceNumberForAllocation) != null ? \
             {of}.spec.sequenceNumberForAllocation : {{}})"
        )
    };
    let (old, new) = (numbers("oldObject"), numbers("object"));
    // Free addresses that stay free keep their order, and released ones are behind them.
    let kept = "variables.unallocatedBefore.filter(u, dyn(variables.allocations[u]) == null)";
    let released = each_ordinal(
        "dyn(variables.allocationsBefore[o]) == null || dyn(variables.allocations[o]) != null || o \
         in variables.unallocated",
    );
    vec![
        (
            foreign(&format!(
                "{} && {}",
                same("deleted"),
                same("affinityClaimTime")
            )),
            "an agent changes nothing in another node's block but the addresses that it borrows",
        ),
        (
            foreign(&format!(
                "size(variables.unallocated) == size(variables.allocations.filter(a, dyn(a) == \
                 null)) && [{kept}].all(kept, size(kept) <= size(variables.unallocated) && \
                 variables.rows.all(r, r >= size(kept) || variables.columns.all(c, r + c >= \
                 size(kept) || kept[r + c] == variables.unallocated[r + c]))) && {released}"
            )),
            "the free list of another node's block has its unallocated addresses, in their order",
        ),
        (
            foreign(&format!(
                "{after} >= {before} && {after} - {before} <= {STEP} && [{old}].all(old, \
                 [{new}].all(new, old.all(k, [int(k)].all(o, !{SAME} || (k in new && new[k] == \
                 old[k]))) && new.all(k, [int(k)].all(o, !{SAME} || k in old))))",
                before = number("oldObject"),
                after = number("object"),
            )),
            "the sequence number of another node's block increases, and those of unchanged \
             addresses stay",
        ),
    ]
}

/// Rules for handles. An annotation has a handle's node. Handles that Calico or an earlier agent
/// has written get it from the operator; until then agents may write only those of tunnels, whose
/// names have the node.
pub(super) fn handles() -> Guard {
    let node_of = |of: &str| {
        format!(
            "has({of}.metadata.annotations) && '{ANNOTATION_HANDLE_NODE}' in \
             {of}.metadata.annotations ? {of}.metadata.annotations['{ANNOTATION_HANDLE_NODE}'] : ''"
        )
    };
    let is_tunnel = "matches('^[a-z]+(-v6)?-tunnel-addr-')";
    let of_tunnel = format!(
        "[variables.id, variables.name].all(id, !id.{is_tunnel} || \
         id.substring(id.indexOf('-tunnel-addr-')) == '-tunnel-addr-' + variables.node)"
    );
    let of_node = format!(
        "(request.operation == 'CREATE' || variables.before == variables.node || (variables.before \
         == '' && variables.name.{is_tunnel})) && (variables.after == variables.before || \
         variables.after == variables.node)"
    );
    Guard::new(
        "margay-node-ipamhandles",
        "ipamhandles",
        &["CREATE", "UPDATE", "DELETE"],
    )
    .variables(vec![
        (
            "id",
            "request.operation == 'DELETE' ? oldObject.spec.handleID : object.spec.handleID".into(),
        ),
        (
            "name",
            "request.operation == 'DELETE' ? oldObject.metadata.name : object.metadata.name".into(),
        ),
        (
            "before",
            format!(
                "request.operation == 'CREATE' ? '' : {}",
                node_of("oldObject")
            ),
        ),
        (
            "after",
            format!(
                "request.operation == 'DELETE' ? variables.before : {}",
                node_of("object")
            ),
        ),
    ])
    .rules(vec![
        (
            of_tunnel,
            "an agent writes the handle of its own tunnel only",
        ),
        (of_node, "an agent writes handles of its own node only"),
        (
            // A long name is cut and ends with a hash, which CEL cannot compute.
            "request.operation == 'DELETE' || variables.name == variables.id.lowerAscii() || \
             size(variables.id) > 253"
                .to_owned(),
            "a handle is named after its id",
        ),
        (
            "request.operation != 'UPDATE' || object.spec.handleID == oldObject.spec.handleID"
                .to_owned(),
            "a handle keeps its id",
        ),
    ])
}
