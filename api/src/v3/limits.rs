//! Parts of schemas that several kinds share.

use kube::core::Rule;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// Schema of a set of one or both directions.
pub(super) fn directions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "enum": ["Ingress", "Egress"] },
        "minItems": 1,
        "maxItems": 2,
        "x-kubernetes-list-type": "set",
    })
}

/// Schema of the action of a staged policy.
pub(super) fn staged_action(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "enum": ["Set", "Delete", "Learn", "Ignore"],
        "default": "Set",
    })
}

/// Schema of an encapsulation mode.
pub(super) fn encapsulation_mode(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["Never", "Always", "CrossSubnet"] })
}

/// Schema of the uses of a pool.
pub(super) fn allowed_uses(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "enum": ["Workload", "Tunnel", "LoadBalancer"] },
        "maxItems": 10,
        "x-kubernetes-list-type": "set",
    })
}

/// Schema of Calico's performance hints.
pub(super) fn performance_hints(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "enum": ["AssumeNeededOnEveryNode"] },
    })
}

/// Rules across the fields of a policy of either kind.
fn policy_rules() -> Vec<Value> {
    let plain = |field: &str| {
        json!({
            "rule": format!("!has(self.{field}) || !self.{field}.contains('global(')"),
            "message": format!("{field}: global() is only for namespace selectors"),
        })
    };
    let no_service = |list: &str, side: &str, remedy: &str| {
        json!({
            "rule": format!(
                "!has(self.{list}) || self.{list}.all(rule, !has(rule.{side}) || \
                 !has(rule.{side}.services))"
            ),
            "message": format!("{list} rules have no services in their {side}: {remedy}"),
        })
    };
    vec![
        plain("selector"),
        plain("serviceAccountSelector"),
        no_service("ingress", "destination", "name them in source"),
        no_service("egress", "source", "name them in destination"),
        json!({
            "rule": "!has(self.egress) || self.egress.all(rule, !has(rule.http))",
            "message": "http is only for ingress rules",
        }),
    ]
}

/// Rules across the fields of a namespaced policy.
pub(super) fn namespaced_rules() -> Value {
    policy_rules().into()
}

/// Rules across the fields of a staged namespaced policy.
pub(super) fn staged_rules() -> Value {
    let others = [
        "order",
        "selector",
        "serviceAccountSelector",
        "types",
        "ingress",
        "egress",
        "performanceHints",
    ];
    [policy_rules(), vec![alone(&others)]].concat().into()
}

/// Rules across the fields of a staged cluster-wide policy.
pub(super) fn staged_global_rules() -> Value {
    let others = [
        "order",
        "selector",
        "namespaceSelector",
        "serviceAccountSelector",
        "types",
        "ingress",
        "egress",
        "applyOnForward",
        "doNotTrack",
        "preDNAT",
        "performanceHints",
    ];
    let mut rules = all_global_rules();
    rules.push(alone(&others));
    rules.into()
}

/// Rule of a staged Kubernetes policy.
pub(super) fn staged_kubernetes_rules() -> Value {
    json!([alone(&["podSelector", "ingress", "egress", "policyTypes"])])
}

/// Rule that the deletion of a policy sets no other field.
fn alone(others: &[&str]) -> Value {
    let absent: Vec<String> = others
        .iter()
        .map(|field| format!("!has(self.{field})"))
        .collect();
    json!({
        "rule": format!(
            "!has(self.stagedAction) || self.stagedAction != 'Delete' || {}",
            absent.join(" && "),
        ),
        "message": "stagedAction Delete must be set alone: remove all other fields but tier",
    })
}

/// Rules across the fields of a cluster-wide policy.
pub(super) fn global_rules() -> Value {
    all_global_rules().into()
}

fn all_global_rules() -> Vec<Value> {
    let in_namespace = |list: &str, side: &str| {
        let service = format!("rule.{side}.services");
        json!({
            "rule": format!(
                "!has(self.{list}) || self.{list}.all(rule, !has(rule.{side}) || !has({service}) \
                 || has({service}.__namespace__))"
            ),
            "message": format!(
                "services in the {side} of {list} rules need their namespace in a cluster-wide \
                 policy"
            ),
        })
    };
    let own = vec![
        json!({
            "rule": "!has(self.namespaceSelector) || !self.namespaceSelector.contains('global(') \
                     || self.namespaceSelector.matches('^[ \\t]*global\\\\([ \\t]*\\\\)[ \\t]*$')",
            "message": "namespaceSelector: global() must be used alone",
        }),
        in_namespace("ingress", "source"),
        in_namespace("egress", "destination"),
    ];
    [policy_rules(), own, host_rules()].concat()
}

/// Rules across the fields for host endpoints.
fn host_rules() -> Vec<Value> {
    let set = |field: &str| format!("has(self.{field}) && self.{field}");
    vec![
        json!({
            "rule": format!("!({} && {})", set("doNotTrack"), set("preDNAT")),
            "message": "doNotTrack and preDNAT exclude each other",
        }),
        json!({
            "rule": format!("!({}) || {}", set("doNotTrack"), set("applyOnForward")),
            "message": "doNotTrack needs applyOnForward: true",
        }),
        json!({
            "rule": format!("!({}) || {}", set("preDNAT"), set("applyOnForward")),
            "message": "preDNAT needs applyOnForward: true",
        }),
        json!({
            "rule": format!(
                "!({}) || !has(self.egress) && (!has(self.types) || !('Egress' in self.types))",
                set("preDNAT"),
            ),
            "message": "preDNAT policies have no egress rules and no type Egress",
        }),
    ]
}

/// Rules of a host endpoint: node and interface.
pub(super) fn host_endpoint_rules() -> Value {
    json!([
        {
            "rule": "has(self.node) && self.node != ''",
            "message": "a host endpoint belongs to one node: write the name of the node",
        },
        {
            "rule": "has(self.interfaceName) && self.interfaceName != '' || has(self.expectedIPs) \
                     && self.expectedIPs.size() > 0",
            "message": "name the interface, * for all of them, or give expectedIPs",
        },
    ])
}

/// Names of namespaced policies, as in Calico: one DNS label, two with a dot in between, or a name
/// made by its converters.
pub(super) fn namespaced_name() -> Rule {
    let label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
    let made = r"(knp|ossg)\\.default\\.[a-z0-9]([-.a-z0-9]*[a-z0-9])?";
    name_rule(&format!(r"^({label}(\\.{label})?|{made})$"))
}

/// Names of cluster-wide policies, as in Calico: one DNS label, or two with a dot in between.
pub(super) fn global_name() -> Rule {
    let label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
    name_rule(&format!(r"^{label}(\\.{label})?$"))
}

fn name_rule(pattern: &str) -> Rule {
    Rule::new(format!("self.metadata.name.matches('{pattern}')"))
        .message("the name of a policy is a DNS label, or two with a dot between them")
}

/// Rules of a pool that depend on its range or on several fields.
pub(super) fn pool_rules() -> Value {
    let is_v4 = "cidr(self.cidr).ip().family() == 4";
    let size = format!("(has(self.blockSize) ? self.blockSize : ({is_v4} ? 26 : 122))");
    let is = |field: &str, value: &str| format!("(!has(self.{field}) || self.{field} == {value})");
    let never = |field: &str| is(field, "'Never'");
    let for_balancers = "has(self.allowedUses) && 'LoadBalancer' in self.allowedUses";
    json!([
        {
            "rule": "self.cidr == oldSelf.cidr",
            "message": "cidr cannot change: create a new pool",
        },
        {
            "rule": "!has(oldSelf.blockSize) || has(self.blockSize) && self.blockSize == \
                     oldSelf.blockSize",
            "message": "blockSize cannot change: create a new pool",
        },
        {
            "rule": "cidr(self.cidr) == cidr(self.cidr).masked()",
            "message": "cidr has bits behind its prefix: write the first address of the range",
        },
        {
            "rule": "!cidr('169.254.0.0/16').containsCIDR(self.cidr) && \
                     !cidr('fe80::/10').containsCIDR(self.cidr)",
            "message": "cidr is link-local: such addresses are not routed",
        },
        {
            "rule": format!(
                "{is_v4} ? {size} >= 20 && {size} <= 32 : {size} >= 116 && {size} <= 128"
            ),
            "message": "blockSize is 20 to 32 for IPv4 and 116 to 128 for IPv6",
        },
        {
            "rule": format!("cidr(self.cidr).prefixLength() <= {size}"),
            "message": "the pool is smaller than one block: widen cidr or raise blockSize",
        },
        {
            "rule": format!("{} || {}", never("ipipMode"), never("vxlanMode")),
            "message": "ipipMode and vxlanMode exclude each other: set one of them to Never",
        },
        {
            "rule": format!("{is_v4} || {}", never("ipipMode")),
            "message": "ipipMode is for IPv4 only: use vxlanMode",
        },
        {
            "rule": format!("!({for_balancers}) || self.allowedUses.size() == 1"),
            "message": "the use LoadBalancer must be set alone: create a separate pool for it",
        },
        {
            "rule": format!(
                "!({for_balancers}) || {} && {} && {} && {}",
                never("ipipMode"),
                never("vxlanMode"),
                is("nodeSelector", "'all()'"),
                is("disableBGPExport", "false"),
            ),
            "message": "a pool for LoadBalancer has no encapsulation, nodeSelector all() and BGP \
                        export",
        },
        {
            "rule": "!has(self.namespaceSelector) || self.namespaceSelector == '' || \
                     has(self.allowedUses) && !('Tunnel' in self.allowedUses)",
            "message": "a pool with a namespaceSelector cannot have the use Tunnel: tunnels belong \
                        to no namespace; set allowedUses to [Workload]",
        },
    ])
}

/// Schema of an AS number: a number or text.
pub(super) fn as_number(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "x-kubernetes-int-or-string": true })
}

/// Schema of a set of names of interfaces.
pub(super) fn interface_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "maxLength": 15 },
        "x-kubernetes-list-type": "set",
    })
}

/// Schema of a duration as Go writes it.
pub(super) fn duration(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 32,
        "pattern": "^([0-9]+(\\.[0-9]+)?(h|m|s|ms))+$",
    })
}

/// Schema of a community.
pub(super) fn community(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "maxLength": 32, "pattern": "^[0-9]+:[0-9]+(:[0-9]+)?$" })
}

/// Rules across the fields of BGP's settings.
pub(super) fn bgp_configuration_rules() -> Value {
    let mesh = "!has(self.nodeToNodeMeshEnabled) || self.nodeToNodeMeshEnabled";
    json!([
        {
            "rule": "!has(self.communities) || has(self.prefixAdvertisements)",
            "message": "communities are names for prefixAdvertisements: say which prefixes have \
             them",
        },
        {
            "rule": format!("!has(self.nodeMeshPassword) || {mesh}"),
            "message": "nodeMeshPassword is for the mesh: leave it out, or enable \
             nodeToNodeMeshEnabled",
        },
        {
            "rule": format!("!has(self.nodeMeshMaxRestartTime) || {mesh}"),
            "message": "nodeMeshMaxRestartTime is for the mesh: leave it out, or enable \
             nodeToNodeMeshEnabled",
        },
    ])
}

/// Rules across the fields of a BGP peer.
pub(super) fn bgp_peer_rules() -> Value {
    let set = |field: &str| format!("(has(self.{field}) && self.{field} != '')");
    let ways = ["peerIP", "peerSelector", "localWorkloadSelector"].map(set);
    let count: Vec<String> = ways.iter().map(|way| format!("({way} ? 1 : 0)")).collect();
    json!([
        {
            "rule": format!("{} == 1", count.join(" + ")),
            "message": "a peer is named by exactly one of peerIP, peerSelector and \
             localWorkloadSelector",
        },
        {
            "rule": format!("!({} && {})", set("node"), set("nodeSelector")),
            "message": "node and nodeSelector exclude each other",
        },
        {
            "rule": format!("!has(self.asNumber) || !{}", ways[1]),
            "message": "asNumber is not for peerSelector: nodes have their own",
        },
        {
            "rule": format!("has(self.asNumber) || !{}", ways[2]),
            "message": "localWorkloadSelector needs asNumber",
        },
        {
            "rule": "!has(self.nextHopMode) || !has(self.keepOriginalNextHop) || \
             !self.keepOriginalNextHop",
            "message": "nextHopMode and keepOriginalNextHop exclude each other: use nextHopMode",
        },
        {
            "rule": format!("!has(self.reachableBy) || {}", ways[0]),
            "message": "reachableBy needs peerIP",
        },
    ])
}

/// Rules across the fields of a rule of a BGP filter.
pub(super) fn bgp_filter_rules() -> Value {
    json!([
        {
            "rule": "has(self.cidr) == has(self.matchOperator)",
            "message": "cidr and matchOperator go together: set both or neither",
        },
        {
            "rule": "!has(self.prefixLength) || has(self.cidr)",
            "message": "prefixLength needs cidr",
        },
        {
            "rule": "!has(self.operations) || self.action == 'Accept'",
            "message": "operations are for the action Accept",
        },
    ])
}
