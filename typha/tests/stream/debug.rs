//! What readers of the debug service see: records, views, problems, and explained verdicts.

use margay_api::endpoint::{HostEndpoint, HostInterface, Profile};
use margay_api::meta::Labels;
use margay_api::network::NodeInfo;
use margay_api::report::Entry;
use margay_calc::model::RecordId;
use margay_calc::update::Update;
use margay_proto::debug::debug_client::DebugClient;
use margay_proto::debug::{
    ExplainRequest, GetRecordRequest, ListRecordsRequest, Party, ViewRequest, party,
};
use margay_proto::sync::{NodeProblem, encode_problems};
use tonic::Code;

use crate::peers::{self, Typha, mk_pod, until};

#[tokio::test]
async fn readers_see_records_and_views() {
    let typha = Typha::start().await;
    typha.observe(vec![mk_pod("a", "n1", 1)]).await;
    let mut refused = mk_pod("bad", "n1", 2);
    refused
        .problems
        .push("spec.selector: \"x ==\": is no selector; correct it".to_owned());
    typha.observe(vec![refused]).await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await;
    let mut debug = DebugClient::new(reader.expect("our CA"));
    let view = debug
        .view(ViewRequest { node: "n1".into() })
        .await
        .expect("a view")
        .into_inner();
    let endpoint = view
        .records
        .iter()
        .find(|record| record.id == "ns/a")
        .expect("endpoint");
    assert_eq!(
        (endpoint.kind.as_str(), endpoint.nodes.as_slice()),
        ("endpoint", &["n1".to_owned()][..])
    );
    assert!(endpoint.text.contains("10.0.0.1"), "{}", endpoint.text);
    let request = ListRecordsRequest {
        kind: "endpoint".into(),
        node: "n1".into(),
        refused_only: false,
    };
    let records = debug
        .list_records(request)
        .await
        .expect("records")
        .into_inner();
    assert_eq!(records.records.len(), 2);
    assert_eq!(records.problems.len(), 1);
    assert_eq!(records.problems[0].object, "Pod ns/bad");
    let lost = HostEndpoint {
        node: "n9".to_owned(),
        labels: Labels::new(),
        interface: HostInterface::All,
        addresses: Vec::new(),
        ports: Vec::new(),
        profiles: Vec::new(),
    };
    typha
        .observe(vec![peers::mk_object(
            "lost",
            Update::HostEndpoint("lost".to_owned(), Some(lost)),
        )])
        .await;
    let mut agent = typha.node("n1").await;
    agent.frame().await;
    let taken = "interface eth0 already has host endpoint a, which is first by name, and only one \
                 is enforced; remove one of them";
    agent
        .refuse(RecordId::HostEndpoint("b".to_owned()), taken)
        .await;
    let registry = &typha.registry;
    until(|| {
        registry
            .sessions()
            .iter()
            .any(|node| !node.progress().errors.is_empty())
    })
    .await;
    let request = ListRecordsRequest {
        refused_only: true,
        ..ListRecordsRequest::default()
    };
    let found = debug
        .list_records(request)
        .await
        .expect("problems")
        .into_inner();
    let reported: Vec<(&str, &str)> = found
        .problems
        .iter()
        .map(|problem| (problem.object.as_str(), problem.reasons[0].as_str()))
        .collect();
    let missing_node = "spec.node: \"n9\": there is no such node, so it is not enforced; correct \
                        the name or delete the host endpoint";
    assert_eq!(
        reported[1..],
        [
            ("HostEndpoint lost", missing_node),
            ("host-endpoint b on node n1", taken)
        ]
    );
    assert!(found.records.is_empty());
    let get = |id: &str| GetRecordRequest {
        kind: "endpoint".into(),
        id: id.into(),
    };
    let missing = debug
        .get_record(get("ns/none"))
        .await
        .expect_err("not there");
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test]
async fn large_responses_are_complete() {
    let typha = Typha::start().await;
    typha.select_everything().await;
    typha
        .observe(
            (1..=300)
                .map(|number| mk_pod(&format!("p{number}"), "n1", number))
                .collect(),
        )
        .await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await;
    let mut debug = DebugClient::new(reader.expect("our CA"));
    let all = debug
        .list_records(ListRecordsRequest::default())
        .await
        .expect("records")
        .into_inner();
    let of = |kind: &str| {
        all.records
            .iter()
            .filter(|record| record.kind == kind)
            .count()
    };
    assert_eq!(
        (of("endpoint"), of("policy"), of("ip-set")),
        (300, 1, 1),
        "{:?}",
        all.problems
    );
    let view = debug
        .view(ViewRequest { node: "n1".into() })
        .await
        .expect("a view")
        .into_inner();
    assert_eq!(
        view.records
            .iter()
            .filter(|record| record.kind != "settings")
            .count(),
        302
    );
    let asked = GetRecordRequest {
        kind: "endpoint".into(),
        id: "ns/p77".into(),
    };
    assert!(
        debug
            .get_record(asked)
            .await
            .expect("a record")
            .into_inner()
            .text
            .contains("10.0.0.77")
    );
}

#[tokio::test]
async fn problems_are_in_the_report_while_they_last() {
    let typha = Typha::start().await;
    assert!(typha.report().await.is_empty());
    let mut changes = typha.registry.subscribe();
    let mut refused = mk_pod("bad", "n1", 2);
    refused
        .problems
        .push("spec.selector: \"x ==\": is no selector; correct it".to_owned());
    typha.observe(vec![refused, mk_pod("good", "n1", 3)]).await;
    changes.changed().await.expect("a change is notified");
    let objects = typha.report().await.objects;
    assert_eq!(
        (
            objects.total,
            objects.first.first().expect("one").subject.as_str()
        ),
        (1, "Pod ns/bad")
    );

    let mut agent = typha.node("n1").await;
    // At once, so possibly before the hello is answered.
    let problems = [
        NodeProblem::new("routes", "there is none", true),
        NodeProblem::new("kernel", "old", false),
    ];
    agent.send(encode_problems(&problems)).await;
    agent.frame().await;
    agent
        .refuse(RecordId::HostEndpoint("b".to_owned()), "taken")
        .await;
    changes.changed().await.expect("a change is notified");
    until(|| !typha.registry.errors().is_empty() && !typha.registry.problems().is_empty()).await;
    let report = typha.report().await;
    assert_eq!(
        report.nodes.first,
        [Entry::new("n1", "routes: there is none")].into(),
        "hints are only in the debug service"
    );
    assert_eq!(
        report.records.first,
        [Entry::new("host-endpoint b on node n1", "taken")].into()
    );

    typha.observe(vec![mk_pod("bad", "n1", 2)]).await;
    drop(agent);
    until(|| typha.registry.errors().is_empty() && typha.registry.problems().is_empty()).await;
    assert!(typha.report().await.is_empty());
}

#[tokio::test]
async fn reflection_lists_every_service() {
    let typha = Typha::start().await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await
        .expect("our CA");
    let wanted = [
        "grpc.health.v1.Health",
        "margay.debug.v1.Debug",
        "margay.sync.v1.Sync",
    ];
    macro_rules! services {
        ($version:ident) => {{
            use tonic_reflection::pb::$version as pb;
            let request = pb::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(pb::server_reflection_request::MessageRequest::ListServices(
                    String::new(),
                )),
            };
            let mut client =
                pb::server_reflection_client::ServerReflectionClient::new(reader.clone());
            let answers = client
                .server_reflection_info(tokio_stream::once(request))
                .await;
            let answer = answers.expect("answers").into_inner().message().await;
            match answer.expect("an answer").and_then(|a| a.message_response) {
                Some(pb::server_reflection_response::MessageResponse::ListServicesResponse(
                    list,
                )) => list
                    .service
                    .into_iter()
                    .map(|service| service.name)
                    .collect(),
                other => panic!("{other:?}"),
            }
        }};
    }
    // grpcurl of Debian supports only v1alpha.
    let listed: [Vec<String>; 2] = [services!(v1), services!(v1alpha)];
    for services in listed {
        for name in wanted {
            assert!(services.iter().any(|found| found == name), "{services:?}");
        }
    }
}

#[tokio::test]
async fn readers_can_explain_a_verdict() {
    let typha = Typha::start().await;
    typha.select_everything().await;
    typha
        .observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 2)])
        .await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await;
    let mut debug = DebugClient::new(reader.expect("our CA"));
    let pod = |name: &str| party::Party::Pod(name.to_owned());
    let address = |text: &str| party::Party::Address(text.to_owned());
    let mut ask = async |from: party::Party, to: party::Party, protocol: &str| {
        let party = |party| Some(Party { party: Some(party) });
        let question = ExplainRequest {
            from: party(from),
            to: party(to),
            protocol: protocol.to_owned(),
            port: 80,
        };
        let answer = debug
            .explain(question)
            .await
            .map(tonic::Response::into_inner);
        answer.map_err(|status| (status.code(), status.message().to_owned()))
    };
    let allowed = ask(pod("ns/a"), pod("ns/b"), "").await.expect("an answer");
    assert_eq!(allowed.verdict, "allow", "{allowed:?}");
    let by_policy = |step: &String| {
        step.starts_with("ingress of ns/b") && step.contains("GlobalNetworkPolicy all")
    };
    assert!(allowed.steps.iter().any(by_policy), "{allowed:?}");
    let denied = ask(address("192.0.2.1"), pod("ns/b"), "udp")
        .await
        .expect("an answer");
    assert_eq!(denied.verdict, "deny", "{denied:?}");
    let found = ask(address("10.0.0.1"), pod("ns/b"), "6")
        .await
        .expect("an answer");
    assert_eq!(
        found.verdict, "allow",
        "an address of a pod is that pod: {found:?}"
    );
    let (code, text) = ask(pod("ns/none"), pod("ns/b"), "")
        .await
        .expect_err("no such pod");
    assert_eq!(code, Code::NotFound, "{text}");
    for (from, to, protocol, named) in [
        (pod("none"), pod("ns/b"), "", "from.pod"),
        (pod("ns/a"), address("x"), "", "to.address"),
        (pod("ns/a"), pod("ns/b"), "gre", "protocol"),
    ] {
        let (code, text) = ask(from, to, protocol).await.expect_err("a bad question");
        assert_eq!(code, Code::InvalidArgument);
        assert!(text.starts_with(named), "{text}");
    }
}

#[tokio::test]
async fn explain_follows_a_packet_through_host_endpoints() {
    let typha = Typha::start().await;
    let host = |name: &str, interface: HostInterface, profiles: Vec<Profile>| HostEndpoint {
        node: "n1".to_owned(),
        labels: Labels::from([("name".to_owned(), name.to_owned())]),
        interface,
        addresses: vec!["192.0.2.7".parse().expect("an address")],
        ports: Vec::new(),
        profiles,
    };
    let mk_host_object = |name: &str, host: HostEndpoint| {
        peers::mk_object(name, Update::HostEndpoint(name.to_owned(), Some(host)))
    };
    let node = NodeInfo {
        ipv4: Some("192.0.2.1/24".parse().expect("an address")),
        ..NodeInfo::default()
    };
    typha
        .observe(vec![
            peers::mk_object("node", Update::Node("n1".to_owned(), Some(node))),
            mk_host_object("closed", host("closed", HostInterface::All, vec![])),
        ])
        .await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await;
    let debug = DebugClient::new(reader.expect("our CA"));
    let address = |text: &str| {
        Some(Party {
            party: Some(party::Party::Address(text.to_owned())),
        })
    };
    let ask = async |to: &str, port: u32| {
        let question = ExplainRequest {
            from: address("198.51.100.1"),
            to: address(to),
            protocol: String::new(),
            port,
        };
        debug
            .clone()
            .explain(question)
            .await
            .expect("an answer")
            .into_inner()
    };
    let closed = ask("192.0.2.1", 80).await;
    assert_eq!(closed.verdict, "deny", "{closed:?}");
    assert!(
        closed
            .steps
            .iter()
            .any(|step| step.contains("host endpoint closed: Normal: no tier decided")),
        "{closed:?}"
    );
    assert_eq!(
        ask("192.0.2.1", 22).await.verdict,
        "allow",
        "a failsafe port"
    );
    assert_eq!(
        ask("192.0.2.9", 80).await.verdict,
        "allow",
        "an address of no pod or node"
    );
    // Only the node knows which of the two applies; the one that names the address is certain.
    typha
        .observe(vec![mk_host_object(
            "open",
            host("open", HostInterface::ByAddress, vec![Profile::Allow]),
        )])
        .await;
    let undecided = ask("192.0.2.1", 80).await;
    assert_eq!(undecided.verdict, "allow", "{undecided:?}");
    assert!(
        undecided
            .steps
            .iter()
            .any(|step| step.contains("host endpoint closed, if it is")),
        "{undecided:?}"
    );
}
