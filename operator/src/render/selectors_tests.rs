use kube_cel::cel::{Context, Program, Value as CelValue};
use kube_cel::{KubeCelExt, VapEvaluator, VapExpression};

use super::*;

/// Returns the expression with its variables substituted, as the evaluator has none.
fn whole(spec: &Value, expression: &str) -> String {
    let mut expression = expression.to_owned();
    let variables: Vec<&Value> = spec["variables"].as_array().unwrap().iter().collect();
    for variable in variables.iter().rev() {
        let name = format!("variables.{}", variable["name"].as_str().unwrap());
        expression = expression.replace(
            &name,
            &format!("({})", variable["expression"].as_str().unwrap()),
        );
    }
    // `dyn` matters to the type checker only.
    expression.replace("dyn(object.spec)", "object.spec")
}

/// Returns the refusal of an object, if it is refused.
fn refusal_of(policy: &Value, spec: &Value) -> Option<String> {
    let validation = &policy["validations"][0];
    let evaluator = VapEvaluator::builder()
        .object(json!({ "metadata": {}, "spec": spec }))
        .build();
    let expression = VapExpression {
        expression: whole(policy, validation["expression"].as_str().unwrap()),
        message: None,
        message_expression: Some(whole(
            policy,
            validation["messageExpression"].as_str().unwrap(),
        )),
    };
    let result = evaluator.evaluate(&[expression]).remove(0);
    (!result.passed).then(|| result.message.unwrap_or_default())
}

/// Policy, spec, and the text that is not a selector, if there is one.
#[test]
fn an_invalid_selector_is_found_in_every_field() {
    let rule = |side: &str, end: Value| {
        json!({
            "ingress": [{ "action": "Deny" }, { "action": "Allow", side: end }],
        })
    };
    let template = |selector: &Option<&str>| match selector {
        Some(text) => json!({ "generateName": "t", "nodeSelector": text }),
        None => json!({ "generateName": "t" }),
    };
    let templates = |selectors: &[Option<&str>]| {
        let templates: Vec<Value> = selectors.iter().map(template).collect();
        json!({ "controllers": { "node": { "hostEndpoint": { "templates": templates } } } })
    };
    let table = [
        (POLICIES, json!({}), None),
        (
            POLICIES,
            json!({ "selector": "a == 'b'", "ingress": [], "egress": [{ "action": "Allow" }] }),
            None,
        ),
        (POLICIES, json!({ "selector": "a = 'b'" }), Some("a = 'b'")),
        (
            POLICIES,
            json!({ "namespaceSelector": "global()", "serviceAccountSelector": "has(" }),
            Some("has("),
        ),
        (
            POLICIES,
            rule("source", json!({ "nets": ["10.0.0.0/8"] })),
            None,
        ),
        (
            POLICIES,
            rule(
                "source",
                json!({ "selector": "has(a)", "notSelector": "x" }),
            ),
            Some("x"),
        ),
        (
            POLICIES,
            rule("destination", json!({ "namespaceSelector": "x ==" })),
            Some("x =="),
        ),
        (
            POLICIES,
            rule("source", json!({ "serviceAccounts": { "names": ["a"] } })),
            None,
        ),
        (
            POLICIES,
            rule("source", json!({ "serviceAccounts": { "selector": "!" } })),
            Some("!"),
        ),
        (
            POLICIES,
            json!({ "egress": [{ "action": "Allow", "destination": { "selector": "(" } }] }),
            Some("("),
        ),
        (NODES, json!({ "cidr": "10.0.0.0/16" }), None),
        (
            NODES,
            json!({ "nodeSelector": "all()", "namespaceSelector": "a in {'b',}" }),
            None,
        ),
        (NODES, json!({ "nodeSelector": "all" }), Some("all")),
        (
            NODES,
            json!({ "peerIP": "192.0.2.1", "nodeSelector": "has(rack)" }),
            None,
        ),
        (NODES, json!({ "peerSelector": "rack" }), Some("rack")),
        (
            NODES,
            json!({ "localWorkloadSelector": "app = 'a'" }),
            Some("app = 'a'"),
        ),
        (NODES, json!({ "controllers": { "node": {} } }), None),
        (NODES, templates(&[None, Some("rack == 'a'")]), None),
        (
            NODES,
            templates(&[Some(""), Some("rack = 'a'")]),
            Some("rack = 'a'"),
        ),
    ];
    for (name, spec, wrong) in table {
        let found = refusal_of(&specification(Mode::V3, &[], name), &spec);
        assert_eq!(found.is_some(), wrong.is_some(), "{spec}: {found:?}");
        if let (Some(found), Some(wrong)) = (found, wrong) {
            assert!(
                found.starts_with(&format!("not a selector: {wrong}; write")),
                "{spec}: {found}"
            );
        }
    }
}

#[test]
fn only_a_changed_spec_is_checked() {
    let program = Program::compile(CHANGED).unwrap();
    let is_checked = |old: Value, new: Value| {
        let mut context = Context::default().with_all();
        context.add_variable("oldObject", old).unwrap();
        context.add_variable("object", new).unwrap();
        program.execute(&context).unwrap() == CelValue::Bool(true)
    };
    let spec = |selector: &str, label: &str| {
        json!({
            "metadata": { "labels": { "l": label } },
            "spec": { "selector": selector },
        })
    };
    assert!(is_checked(Value::Null, spec("x", "")));
    assert!(is_checked(spec("all()", ""), spec("x", "")));
    assert!(
        !is_checked(spec("x", ""), spec("x", "new")),
        "a label of an object that was stored before"
    );
    assert!(!is_checked(spec("x", ""), json!({ "metadata": {} })));
}
