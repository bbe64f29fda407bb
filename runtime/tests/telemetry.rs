//! Telemetry belongs to the process, so this file has one process and one test.

use std::time::Duration;

use margay_runtime::grpc;
use margay_runtime::telemetry::{self, Format, Settings};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_start_filter_change_and_export() {
    assert!(matches!(
        telemetry::set_filter("info"),
        Err(telemetry::Error::NotStarted)
    ));

    let collector = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let endpoint = format!("http://{}", collector.local_addr().expect("address"));
    let settings = Settings {
        format: Format::Json,
        service: "margay-test".to_owned(),
        endpoint: Some(endpoint),
        certificate: None,
        timeout: Duration::from_secs(1),
        attributes: Vec::new(),
    };
    assert!(matches!(
        telemetry::start(&settings, "=nonsense=,"),
        Err(telemetry::Error::Filter { .. })
    ));
    let guard = telemetry::start(&settings, "warn").expect("the first start");
    assert!(matches!(
        telemetry::start(&settings, "warn"),
        Err(telemetry::Error::Twice(_))
    ));

    assert!(tracing::debug_span!(target: "margay_test", "hidden").is_disabled());
    assert_eq!(
        grpc::set_log("margay_test=debug\n").expect("a filter"),
        "warn"
    );
    assert!(!tracing::debug_span!(target: "margay_test", "shown").is_disabled());
    let refusal = grpc::set_log("a=b=c").expect_err("no filter");
    assert!(
        refusal.code() == Code::InvalidArgument && refusal.message().contains("a=b=c"),
        "{refusal}"
    );

    // A span of ours reaches the collector at shutdown; one of a library is not recorded.
    let span = tracing::info_span!(target: "margay_test", "work");
    assert!(telemetry::of(&span).is_some());
    assert_eq!(
        telemetry::of(&tracing::info_span!(target: "h2", "frame")),
        None
    );
    drop(span);
    let collected = tokio::spawn(async move {
        let (mut stream, _) = collector.accept().await.expect("accept");
        let mut preface = [0_u8; 24];
        stream.read_exact(&mut preface).await.expect("read");
        preface
    });
    guard.shutdown().await;
    assert_eq!(
        &collected.await.expect("collector"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    );
}
