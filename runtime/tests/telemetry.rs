//! Telemetry belongs to the process, so this file has one process and one test.

use std::sync::Arc;
use std::time::Duration;

use margay_runtime::telemetry::{self, Format, Settings};
use margay_runtime::{admin, ready::Readiness, shutdown::Shutdown};
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn put_log(address: std::net::SocketAddr, filter: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connect");
    let request = format!(
        "PUT /log HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{filter}",
        filter.len()
    );
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.expect("read");
    reply
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_start_filter_change_and_export() {
    assert!(matches!(telemetry::set_filter("info"), Err(telemetry::Error::NotStarted)));

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
    assert!(matches!(telemetry::start(&settings, "=nonsense=,"), Err(telemetry::Error::Filter { .. })));
    let guard = telemetry::start(&settings, "warn").expect("the first start");
    assert!(matches!(telemetry::start(&settings, "warn"), Err(telemetry::Error::Twice(_))));

    assert!(tracing::debug_span!(target: "margay_test", "hidden").is_disabled());
    let address = admin::serve(
        "127.0.0.1:0".parse().expect("address"),
        Arc::new(Registry::default()),
        Readiness::default(),
        Shutdown::default(),
    )
    .await
    .expect("admin port");
    let reply = put_log(address, "margay_test=debug\n").await;
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("was warn"), "{reply}");
    assert!(!tracing::debug_span!(target: "margay_test", "shown").is_disabled());
    let reply = put_log(address, "a=b=c").await;
    assert!(reply.starts_with("HTTP/1.1 400") && reply.contains("a=b=c"), "{reply}");

    // A span of ours reaches the collector at shutdown; one of a library is not recorded.
    let span = tracing::info_span!(target: "margay_test", "work");
    assert!(telemetry::of(&span).is_some());
    assert_eq!(telemetry::of(&tracing::info_span!(target: "h2", "frame")), None);
    drop(span);
    let collected = tokio::spawn(async move {
        let (mut stream, _) = collector.accept().await.expect("accept");
        let mut preface = [0_u8; 24];
        stream.read_exact(&mut preface).await.expect("read");
        preface
    });
    guard.shutdown().await;
    assert_eq!(&collected.await.expect("collector"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
}
