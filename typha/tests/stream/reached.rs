//! How far a version of an object is, for those who wait until it is in force.

use margay_proto::debug::debug_client::DebugClient;
use margay_proto::debug::{ReachedRequest, ReachedResponse};
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use tonic::Code;
use tonic::transport::Channel;

use crate::peers::{Typha, key, mk_pod, until};

async fn ask(debug: &mut DebugClient<Channel>, kind: &str, version: u64) -> ReachedResponse {
    let request = ReachedRequest {
        kind: kind.to_owned(),
        namespace: "ns".to_owned(),
        name: "a".to_owned(),
        resource_version: version,
    };
    let answer = debug.reached(request).await;
    answer.expect("an answer").into_inner()
}

fn received(version: u64) -> Cause {
    Cause {
        version,
        ..Cause::default()
    }
}

#[tokio::test]
async fn a_version_is_reached_with_the_revision_that_nodes_must_acknowledge() {
    let typha = Typha::start().await;
    typha.select_everything().await;
    let mut agent = typha.node("n1").await;
    agent.frame().await;
    agent.ack().await;
    let acked = || typha.registry.sessions()[0].progress().is_current();
    until(acked).await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await;
    let mut debug = DebugClient::new(reader.expect("our CA"));
    assert!(
        !ask(&mut debug, "Pod", 7).await.reached,
        "nothing came of it"
    );
    assert!(ask(&mut debug, "Pod", 0).await.reached, "it is not there");

    typha
        .send(Event::Observed {
            kind: "Pod",
            objects: vec![mk_pod("a", "n1", 1)],
            cause: received(7),
        })
        .await;
    let first = ask(&mut debug, "Pod", 7).await;
    assert!(first.reached);
    assert!(
        first.nodes[0].sent_revision > first.nodes[0].acked_revision,
        "{first:?}"
    );
    assert!(!ask(&mut debug, "Pod", 8).await.reached, "a later version");
    assert!(!ask(&mut debug, "Pod", 0).await.reached, "it is there");
    agent.frame().await;
    agent.ack().await;
    until(acked).await;
    let then = ask(&mut debug, "Pod", 7).await;
    assert_eq!(then.nodes[0].acked_revision, first.nodes[0].sent_revision);
    let frames: Vec<u64> = then.nodes[0].acked.iter().map(|one| one.revision).collect();
    assert_eq!(frames.last(), Some(&first.nodes[0].sent_revision));

    typha
        .send(Event::Deleted {
            kind: "Pod",
            key: key("a"),
            cause: received(9),
        })
        .await;
    assert!(ask(&mut debug, "Pod", 0).await.reached);
    let unknown = debug
        .reached(ReachedRequest {
            kind: "Gateway".to_owned(),
            ..ReachedRequest::default()
        })
        .await;
    assert_eq!(
        unknown.expect_err("no such kind").code(),
        Code::InvalidArgument
    );
}
