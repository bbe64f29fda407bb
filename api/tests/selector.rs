//! The selector language as tables, and properties that relate text, tree, verdict and index.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use kube_cel::KubeCelExt;
use kube_cel::cel::{Context, Program, Value};
use margay_api::meta::Labels;
use margay_api::selector::{self, MAX_DEPTH, MAX_LABEL, Node, Restriction, Selector};
use proptest::prelude::*;

fn mk_labels(text: &str) -> Labels {
    text.split_whitespace()
        .map(|pair| pair.split_once('=').unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn parse(text: &str) -> Selector {
    Selector::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Selector, labels that match, labels that do not.
const VERDICTS: &[(&str, &[&str], &[&str])] = &[
    ("", &["", "a=b"], &[]),
    ("  \t", &[""], &[]),
    ("all()", &["", "a=b"], &[]),
    ("all( \t)", &[""], &[]),
    ("global()", &["", "a=b"], &[]),
    ("!all()", &[], &["", "a=b"]),
    ("has(a)", &["a=b", "a="], &["", "b=a"]),
    ("has( a\t)", &["a=b"], &["b=a"]),
    ("!has(a)", &["", "b=a"], &["a=b"]),
    ("!!has(a)", &["a=b"], &[""]),
    ("! ! !has(a)", &[""], &["a=b"]),
    ("a == 'b'", &["a=b", "a=b b=c"], &["", "a=a", "b=a", "a=bb"]),
    ("a==\"b\"", &["a=b"], &["a=a"]),
    ("a == ''", &["a="], &["", "a=b"]),
    ("a != 'b'", &["", "a=a", "b=b"], &["a=b"]),
    ("!a == 'b'", &["", "a=a"], &["a=b"]),
    ("!a != 'b'", &["a=b"], &["", "a=a"]),
    ("a in {'a', 'b'}", &["a=a", "a=b"], &["", "a=c", "b=a"]),
    ("a in{'a',}", &["a=a"], &["a=b"]),
    ("a in {}", &[], &["", "a=b"]),
    ("a not in {}", &["", "a=b"], &[]),
    ("a not in {'a'}", &["", "a=b"], &["a=a"]),
    ("a notin {'a'}", &["", "a=b"], &["a=a"]),
    ("a not \t in {'a'}", &["a=b"], &["a=a"]),
    ("!a in {'a'}", &["", "a=b"], &["a=a"]),
    ("a contains 'bc'", &["a=abcd", "a=bc"], &["", "a=b", "b=bc"]),
    ("a contains''", &["a=", "a=b"], &[""]),
    ("a starts with 'b'", &["a=bc"], &["", "a=cb"]),
    ("a startswith 'b'", &["a=b"], &["a=cb"]),
    ("a ends with 'b'", &["a=cb"], &["", "a=bc"]),
    ("a endswith\t'b'", &["a=b"], &["a=bc"]),
    (
        "a == 'a' && b == 'b'",
        &["a=a b=b"],
        &["", "a=a", "b=b", "a=a b=c"],
    ),
    ("a == 'a' || b == 'b'", &["a=a", "b=b"], &["", "a=b"]),
    (
        "has(a)&&has(b)||has(c)",
        &["c=1", "a=1 b=1"],
        &["a=1", "b=1"],
    ),
    (
        "has(a) || has(b) && has(c)",
        &["a=1", "b=1 c=1"],
        &["b=1", "c=1"],
    ),
    (
        "(has(a) || has(b)) && has(c)",
        &["a=1 c=1"],
        &["a=1", "c=1"],
    ),
    ("!(has(a) || has(b))", &["", "c=1"], &["a=1", "b=1"]),
    ("((has(a)))", &["a=1"], &[""]),
    ("in in {'in'}", &["in=in"], &["in=x", "a=in"]),
    ("has == 'all'", &["has=all"], &[""]),
    (
        "all == 'x' && global == 'y'",
        &["all=x global=y"],
        &["all=x"],
    ),
    ("contains contains 'x'", &["contains=xx"], &[""]),
    ("-a_./0 == 'b'", &["-a_./0=b"], &[""]),
    ("a == 'x\\'", &["a=x\\"], &["a=x"]),
    ("a == 'é\"'", &["a=é\""], &["a=é"]),
];

#[test]
fn verdicts() {
    for (text, matching, others) in VERDICTS {
        let selector = parse(text);
        for labels in *matching {
            assert!(
                selector.matches(&mk_labels(labels)),
                "{text:?} must match {labels:?}"
            );
        }
        for labels in *others {
            assert!(
                !selector.matches(&mk_labels(labels)),
                "{text:?} must not match {labels:?}"
            );
        }
    }
}

/// Text that is not a selector, with the position of the error.
const INVALID: &[(&str, usize)] = &[
    ("b == b", 6),
    ("'b' == b", 1),
    ("b", 2),
    ("a b", 3),
    ("a = 'b'", 3),
    ("a == 'b", 6),
    ("a == \"b'", 6),
    ("a == 'b' c == 'd'", 10),
    ("a == 'b' &&", 12),
    ("a == 'b' & c == 'd'", 10),
    ("|| a == 'b'", 1),
    ("a in 'b'", 6),
    ("a in {'b'", 10),
    ("a in {'b' 'c'}", 11),
    ("a in {,}", 7),
    ("a in {b}", 7),
    ("a inb {'b'}", 3),
    ("a not {'b'}", 3),
    ("a containsx 'b'", 3),
    ("has(a", 6),
    ("has()", 5),
    ("has('a')", 5),
    ("has (a)", 5),
    ("all ()", 5),
    ("all(a)", 5),
    ("all", 4),
    ("(a == 'b'", 10),
    ("a == 'b')", 9),
    ("()", 2),
    ("!", 2),
    ("a\n== 'b'", 2),
    ("a == 'b'\n", 9),
    ("é == 'b'", 1),
    ("a == 'é' é", 10),
    ("$a == 'b'", 1),
    ("a < '3'", 3),
    ("a == b()", 6),
];

#[test]
fn invalid_text_is_refused_at_the_right_place() {
    for (text, position) in INVALID {
        let error = Selector::parse(text).expect_err(text);
        assert_eq!(error.position, *position, "{text:?}: {error}");
    }
    let error = Selector::parse("a == b").unwrap_err();
    assert_eq!(
        error.to_string(),
        "at character 6: expected a quoted value, found 'b'; put values in single or double \
         quotes; there are no escapes"
    );
}

#[test]
fn length_and_depth_are_bounded() {
    let nested = |depth| format!("{}has(a){}", "(".repeat(depth), ")".repeat(depth));
    let named = |length| format!("has({})", "a".repeat(length));
    assert!(Selector::parse(&nested(MAX_DEPTH)).is_ok());
    assert!(Selector::parse(&nested(MAX_DEPTH + 1)).is_err());
    assert!(Selector::parse(&"(".repeat(1_000_000)).is_err());
    assert!(Selector::parse(&format!("{}has(a)", "!".repeat(1_000_000))).is_ok());
    assert!(Selector::parse(&named(MAX_LABEL)).is_ok());
    assert!(Selector::parse(&named(MAX_LABEL + 1)).is_err());
}

/// Verdict of the API server on texts.
struct Admission(Program);

impl Admission {
    fn new() -> Self {
        Self(Program::compile(&selector::cel("text")).unwrap())
    }

    fn takes(&self, text: &str) -> bool {
        let mut context = Context::default().with_all();
        context.add_variable("text", text).unwrap();
        match self.0.execute(&context) {
            Ok(Value::Bool(takes)) => takes,
            other => panic!("{text:?}: {other:?}"),
        }
    }
}

#[test]
fn the_api_server_accepts_exactly_what_the_parser_accepts() {
    let admission = Admission::new();
    for (text, ..) in VERDICTS {
        assert!(admission.takes(text), "{text:?}");
    }
    for (text, _) in INVALID {
        assert!(!admission.takes(text), "{text:?}");
    }
    for depth in [1, 7, 8, 9, 20, MAX_DEPTH] {
        let (open, close) = ("(".repeat(depth), ")".repeat(depth));
        assert!(admission.takes(&format!("{open}has(a){close}")), "{depth}");
        assert!(
            admission.takes(&format!("({open}has(a){close} || !{open}a == '(('{close})")),
            "{depth}"
        );
        assert!(
            !admission.takes(&format!("{open}has(a){close})")),
            "{depth}"
        );
        assert!(
            !admission.takes(&format!("({open}has(a){close}")),
            "{depth}"
        );
        assert!(
            !admission.takes(&format!("has(a)) && ({open}has(a){close}")),
            "{depth}"
        );
    }
    for (length, takes) in [(MAX_LABEL, true), (MAX_LABEL + 1, false)] {
        let label = "a".repeat(length);
        for text in [
            format!("has({label})"),
            format!("{label} == 'b'"),
            format!("{label} in {{'b'}}"),
            format!("!({label}=='b')"),
        ] {
            assert_eq!(
                (Selector::parse(&text).is_ok(), admission.takes(&text)),
                (takes, takes),
                "{length}"
            );
        }
        assert!(
            admission.takes(&format!("a == '{label}' && b contains \"{label}\"")),
            "a value is no label"
        );
    }
}

/// Tokens of which most selectors, and most mistakes in them, consist.
const SYMBOLS: [&str; 30] = [
    " ",
    " ",
    "\t",
    "\n",
    "!",
    "(",
    ")",
    "&&",
    "||",
    "&",
    "all()",
    "global( )",
    "has(",
    "has( a )",
    "a",
    "-b./",
    "==",
    "!=",
    "=",
    " in ",
    "notin",
    " not in ",
    " contains ",
    " starts with ",
    "{'x', \"y\",}",
    "{}",
    "'v'",
    "\"(\"",
    "'",
    "é",
];

/// A text that is probably a selector, or one with a token added, removed or exchanged.
fn written() -> impl Strategy<Value = String> {
    let operand = prop::sample::select(vec![
        "all()",
        "has(a)",
        "a == 'b'",
        "a!=\"(\"",
        "a in {'x',}",
        "a not in {}",
        "a  contains ')'",
        "in in {}",
    ]);
    let sound = operand
        .prop_map(str::to_owned)
        .prop_recursive(5, 24, 3, |inner| {
            prop_oneof![
                inner.clone().prop_map(|inner| format!("!{inner}")),
                inner.clone().prop_map(|inner| format!("( {inner})")),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{a}&& {b}")),
                (inner.clone(), inner).prop_map(|(a, b)| format!("{a} ||{b}")),
            ]
        });
    let piece = prop::sample::select(SYMBOLS.to_vec());
    let spoilt = (
        sound.clone(),
        any::<prop::sample::Index>(),
        piece.clone(),
        0..3_usize,
    )
        .prop_map(|(text, at, piece, cut)| {
            let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            let at = starts[at.index(starts.len())];
            let rest: String = text[at..].chars().skip(cut).collect();
            format!("{}{piece}{rest}", &text[..at])
        });
    let noise = prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat());
    prop_oneof![2 => sound, 3 => spoilt, 2 => noise]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 600,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_api_server_and_the_parser_agree_on_any_text(text in written()) {
        prop_assert_eq!(
            Admission::new().takes(&text),
            Selector::parse(&text).is_ok(),
            "{:?}",
            text,
        );
    }
}

/// Text and its canonical form.
const CANONICAL: &[(&str, &str)] = &[
    ("", "all()"),
    (" all( )", "all()"),
    ("global()", "global()"),
    ("!!has(a)", "has(a)"),
    ("!!!has( a )", "!has(a)"),
    ("a=='b'", "a == \"b\""),
    ("a != 'b\"'", "a != 'b\"'"),
    ("a in {'c','b' , 'c',}", "a in {\"b\", \"c\"}"),
    ("a notin {}", "a not in {}"),
    (
        "a startswith 'x' && b endswith 'y'",
        "(a starts with \"x\" && b ends with \"y\")",
    ),
    ("((a contains 'x'))", "a contains \"x\""),
    (
        "has(a) || has(b) && !has(c)",
        "(has(a) || (has(b) && !has(c)))",
    ),
    (
        "has(a) && (has(b) && has(c))",
        "(has(a) && (has(b) && has(c)))",
    ),
    ("!(has(a) || has(b))", "!(has(a) || has(b))"),
    ("!(!has(a))", "has(a)"),
];

#[test]
fn canonical_text() {
    for (text, canonical) in CANONICAL {
        assert_eq!(parse(text).to_string(), *canonical);
    }
}

#[test]
fn ids_are_calicos() {
    assert_eq!(
        Selector::all().id(),
        "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug"
    );
    assert_eq!(
        parse("a in {'x','y'}").id(),
        parse(" a in { \"y\",'x' }").id()
    );
    assert_ne!(parse("has(a)").id(), parse("has(b)").id());
}

#[test]
fn prefixes_reach_every_label() {
    let text = "has(a) && b == 'v' && !(c in {'v'} || d not in {'v'}) && e != 'v' && f contains \
                'v' && g starts with 'v' && h ends with 'v' && all() && global()";
    let prefixed = "(has(p.a) && p.b == \"v\" && !(p.c in {\"v\"} || p.d not in {\"v\"}) && p.e != \
                    \"v\" && p.f contains \"v\" && p.g starts with \"v\" && p.h ends with \"v\" && \
                    all() && global())";
    assert_eq!(parse(text).with_prefix("p.").to_string(), prefixed);
}

#[test]
fn conjunctions_are_flat_and_without_duplicates() {
    let and = |parts: &[&str]| Selector::and(parts.iter().map(|text| parse(text))).to_string();
    assert_eq!(and(&[]), "all()");
    assert_eq!(and(&["all()", ""]), "all()");
    assert_eq!(and(&["all()", "has(a)"]), "has(a)");
    assert_eq!(and(&["has(a)", "has(b) && has(a)"]), "(has(a) && has(b))");
    assert_eq!(
        and(&["has(a)", "has(b) || has(c)"]),
        "(has(a) && (has(b) || has(c)))"
    );
}

/// Selector and its restrictions of labels: `+` present, `-` absent, else the values.
const RESTRICTIONS: &[(&str, &[(&str, &str)])] = &[
    ("all()", &[]),
    ("has(a)", &[("a", "+")]),
    ("!has(a)", &[("a", "-")]),
    ("a == 'x'", &[("a", "x")]),
    ("a != 'x'", &[]),
    ("!a != 'x'", &[("a", "x")]),
    ("a in {'x', 'y'}", &[("a", "x y")]),
    ("a in {}", &[("a", "")]),
    ("a not in {'x'}", &[]),
    ("!a not in {'x'}", &[("a", "x")]),
    (
        "a contains 'x' && b starts with 'y' && c ends with 'z'",
        &[("a", "+"), ("b", "+"), ("c", "+")],
    ),
    ("!a contains 'x'", &[]),
    (
        "has(a) && a in {'x', 'y'} && a in {'y', 'z'}",
        &[("a", "y")],
    ),
    ("has(a) && !has(a)", &[("a", "")]),
    ("a == 'x' || a == 'y'", &[("a", "x y")]),
    ("a == 'x' || has(a)", &[("a", "+")]),
    ("a == 'x' || !has(a)", &[]),
    ("a == 'x' || b == 'y'", &[]),
    ("a == 'x' || b in {}", &[("a", "x")]),
    ("b in {} || a == 'x'", &[("a", "x")]),
    (
        "(a == 'x' && b == 'y') || (a == 'z' && c == 'y')",
        &[("a", "x z")],
    ),
    ("!(has(a) || b != 'x')", &[("a", "-"), ("b", "x")]),
    ("!(has(a) && has(b))", &[]),
    ("!(has(a) && has(a))", &[("a", "-")]),
];

#[test]
fn restrictions() {
    for (text, wanted) in RESTRICTIONS {
        let wanted: Vec<_> = wanted
            .iter()
            .map(|(label, demand)| {
                let demand = match *demand {
                    "+" => Restriction::Present,
                    "-" => Restriction::Absent,
                    values => {
                        Restriction::OneOf(values.split_whitespace().map(str::to_owned).collect())
                    }
                };
                ((*label).to_owned(), demand)
            })
            .collect();
        let found: Vec<_> = parse(text).restrictions().into_iter().collect();
        assert_eq!(found, wanted, "{text}");
    }
}

fn arb_node() -> impl Strategy<Value = Node> {
    let label =
        || prop::sample::select(vec!["a", "b", "in", "has", "x.y/z-1"]).prop_map(str::to_owned);
    let value =
        || prop::sample::select(vec!["", "x", "xy", "it's", "\"", " && "]).prop_map(str::to_owned);
    let values = move || prop::collection::btree_set(value(), 0..3);
    let leaf = prop_oneof![
        Just(Node::All),
        Just(Node::Global),
        label().prop_map(Node::Has),
        (label(), value()).prop_map(|(label, value)| Node::Equals(label, value)),
        (label(), value()).prop_map(|(label, value)| Node::NotEquals(label, value)),
        (label(), value()).prop_map(|(label, value)| Node::Contains(label, value)),
        (label(), value()).prop_map(|(label, value)| Node::StartsWith(label, value)),
        (label(), value()).prop_map(|(label, value)| Node::EndsWith(label, value)),
        (label(), values()).prop_map(|(label, values)| Node::In(label, values)),
        (label(), values()).prop_map(|(label, values)| Node::NotIn(label, values)),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let list = prop::collection::vec(inner.clone(), 2..4);
        let not = inner.prop_map(|node| match node {
            Node::Not(operand) => *operand,
            node => Node::Not(Box::new(node)),
        });
        prop_oneof![
            not,
            list.clone().prop_map(Node::And),
            list.prop_map(Node::Or)
        ]
    })
}

fn arb_labels() -> impl Strategy<Value = Labels> {
    let label =
        prop::sample::select(vec!["a", "b", "in", "has", "x.y/z-1"]).prop_map(str::to_owned);
    let value = prop::sample::select(vec!["", "x", "xy", "xyz", "it's"]).prop_map(str::to_owned);
    prop::collection::btree_map(label, value, 0..4)
}

proptest! {
    #[test]
    fn canonical_text_parses_to_the_same_tree(root in arb_node()) {
        let selector = Selector { root };
        prop_assert_eq!(Selector::parse(&selector.to_string()), Ok(selector));
    }

    #[test]
    fn restrictions_hold_wherever_the_selector_matches(root in arb_node(), labels in arb_labels()) {
        let selector = Selector { root };
        if selector.matches(&labels) {
            for (label, demand) in selector.restrictions() {
                let found = labels.get(&label);
                let holds = match demand {
                    Restriction::Present => found.is_some(),
                    Restriction::Absent => found.is_none(),
                    Restriction::OneOf(values) => found.is_some_and(|value| values.contains(value)),
                };
                prop_assert!(holds, "{} demands too much of {}", selector, label);
            }
        }
    }

    #[test]
    fn conjunction_means_all_parts(
        nodes in prop::collection::vec(arb_node(), 0..4),
        labels in arb_labels(),
    ) {
        let parts: Vec<Selector> = nodes.into_iter().map(Selector::from).collect();
        let wanted = parts.iter().all(|part| part.matches(&labels));
        prop_assert_eq!(Selector::and(parts).matches(&labels), wanted);
    }

    #[test]
    fn prefixed_selector_sees_prefixed_labels(root in arb_node(), labels in arb_labels()) {
        let selector = Selector { root };
        let prefixed = labels
            .iter()
            .map(|(name, value)| (format!("p.{name}"), value.clone()))
            .collect();
        prop_assert_eq!(selector.with_prefix("p.").matches(&prefixed), selector.matches(&labels));
    }

    #[test]
    fn no_text_panics(text in "[ab ()!&|{},'\"=inhas\\t\u{e9}]{0,40}") {
        if let Ok(selector) = Selector::parse(&text) {
            prop_assert_eq!(Selector::parse(&selector.to_string()), Ok(selector));
        }
    }

    #[test]
    fn labels_of_sets_are_sorted(values in prop::collection::vec("[a-z]{0,3}", 0..5)) {
        let text = format!(
            "a in {{{}}}",
            values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(","),
        );
        prop_assert_eq!(
            parse(&text).root,
            Node::In("a".to_owned(), values.into_iter().collect::<BTreeSet<_>>()),
        );
    }
}
