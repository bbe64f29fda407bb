use super::*;
use serde_json::{Value, json};

fn convert(spec: Value) -> Result<Policy, Refusal> {
    let object = json!({"metadata": {"namespace": "x", "name": "p"}, "spec": spec});
    policy(&serde_json::from_value(object).expect("a NetworkPolicy"))
}

/// One line for each rule: direction, protocol, peer, ports.
fn show(policy: &Policy) -> String {
    let entity = |entity: &EntityMatch| {
        let nets = entity.nets.iter().map(|net| net.to_string());
        let not_nets = entity.not_nets.iter().map(|net| format!("!{net}"));
        let selector = entity.selector.iter().map(|selector| selector.to_string());
        let parts: Vec<String> = nets.chain(not_nets).chain(selector).collect();
        if parts.is_empty() { "any".to_owned() } else { parts.join(" ") }
    };
    let ports = |ports: &[Port]| {
        let port = |port: &Port| match port {
            Port::Range(range) if range.first == range.last => range.first.to_string(),
            Port::Range(range) => format!("{}-{}", range.first, range.last),
            Port::Named(name) => name.clone(),
        };
        ports.iter().map(port).collect::<Vec<_>>().join(",")
    };
    let protocol = |rule: &Rule| rule.protocol.map_or("any".to_owned(), |protocol| protocol.0.to_string());
    let mut text = format!("{}\ningress {} egress {}\n", policy.selector, policy.applies_ingress, policy.applies_egress);
    for rule in &policy.ingress {
        text += &format!("from {} protocol {} ports [{}]\n", entity(&rule.source), protocol(rule), ports(&rule.destination.ports));
    }
    for rule in &policy.egress {
        text += &format!("to {} protocol {} ports [{}]\n", entity(&rule.destination), protocol(rule), ports(&rule.destination.ports));
    }
    text
}

fn check(spec: Value, expected: expect_test::Expect) {
    expected.assert_eq(&show(&convert(spec).expect("a sound policy")));
}

#[test]
fn an_empty_policy_isolates_its_namespace() {
    check(
        json!({"podSelector": {}}),
        expect_test::expect![[r#"
            (projectcalico.org/namespace == "x" && projectcalico.org/orchestrator == "k8s")
            ingress true egress false
        "#]],
    );
}

#[test]
fn types_follow_the_rules_unless_they_are_given() {
    let applies = |spec: Value| convert(spec).map(|policy| (policy.applies_ingress, policy.applies_egress));
    assert_eq!(applies(json!({"podSelector": {}, "egress": []})), Ok((true, true)));
    assert_eq!(applies(json!({"podSelector": {}, "policyTypes": ["Egress"]})), Ok((false, true)));
    assert_eq!(applies(json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})), Ok((true, true)));
}

#[test]
fn a_rule_is_the_product_of_peers_and_protocols() {
    check(
        json!({
            "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["b", "a"]}, {"key": "x", "operator": "DoesNotExist"}]},
            "ingress": [{
                "from": [
                    {"podSelector": {"matchLabels": {"role": "client"}}},
                    {"namespaceSelector": {}},
                    {"namespaceSelector": {"matchLabels": {"team": "a"}}, "podSelector": {}},
                    {"ipBlock": {"cidr": "10.1.2.3/16", "except": ["10.1.0.0/24"]}},
                ],
                "ports": [{"port": 80}, {"port": "http"}, {"port": 8000, "endPort": 8010, "protocol": "TCP"}, {"protocol": "UDP"}, {"port": 53, "protocol": "UDP"}],
            }],
            "egress": [{}],
        }),
        expect_test::expect![[r#"
            (projectcalico.org/namespace == "x" && projectcalico.org/orchestrator == "k8s" && app == "web" && tier not in {"a", "b"} && !has(x))
            ingress true egress true
            from (projectcalico.org/namespace == "x" && projectcalico.org/orchestrator == "k8s" && role == "client") protocol 6 ports [80,http,8000-8010]
            from (projectcalico.org/namespace == "x" && projectcalico.org/orchestrator == "k8s" && role == "client") protocol 17 ports []
            from (has(projectcalico.org/namespace) && projectcalico.org/orchestrator == "k8s") protocol 6 ports [80,http,8000-8010]
            from (has(projectcalico.org/namespace) && projectcalico.org/orchestrator == "k8s") protocol 17 ports []
            from (pcns.team == "a" && projectcalico.org/orchestrator == "k8s") protocol 6 ports [80,http,8000-8010]
            from (pcns.team == "a" && projectcalico.org/orchestrator == "k8s") protocol 17 ports []
            from 10.1.0.0/16 !10.1.0.0/24 protocol 6 ports [80,http,8000-8010]
            from 10.1.0.0/16 !10.1.0.0/24 protocol 17 ports []
            to any protocol any ports []
        "#]],
    );
}

#[test]
fn a_wrong_rule_is_left_out_and_the_rest_stays() {
    let refusal = convert(json!({
        "podSelector": {},
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]}, {"ports": [{"port": 80}]}, {"ports": [{"port": 90, "endPort": 80}]}],
    }))
    .expect_err("two wrong rules");
    let problems: Vec<String> = refusal.problems.iter().map(Problem::to_string).collect();
    assert_eq!(
        problems,
        [
            r#"spec.ingress[0].from[0].ipBlock.cidr: "10.0.0.0/99": must be a range like 10.0.0.0/8; correct the range"#,
            r#"spec.ingress[2].ports[0].endPort: "80": must not be below port 90; exchange the two"#,
        ]
    );
    assert_eq!(refusal.closed.expect("the rest").ingress.len(), 1);
}

#[test]
fn a_wrong_pod_selector_closes_all_pods_of_the_namespace() {
    let spec = json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}, "ingress": [{}]});
    let refusal = convert(spec).expect_err("no such operator");
    assert!(refusal.prefers_former);
    let closed = refusal.closed.expect("something stands in its place");
    let all = convert(json!({"podSelector": {}})).expect("a policy of all pods").1;
    assert_eq!(closed, all, "which allows nothing");
}
