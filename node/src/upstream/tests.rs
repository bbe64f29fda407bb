//! A server that answers nothing.

use std::path::Path;

use margay_runtime::tls::{Files, Tls, incoming};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;

use super::*;

/// Writes a certificate of this authority with its key.
fn write(folder: &Path, issuer: &Issuer<'_, KeyPair>, authority: &str, name: &str) {
    let mut params = CertificateParams::new([SERVER_NAME.to_owned()]).expect("params");
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let key = KeyPair::generate().expect("key");
    let certificate = params.signed_by(&key, issuer).expect("sign");
    let files = [
        ("tls.crt", certificate.pem()),
        ("tls.key", key.serialize_pem()),
        ("ca.crt", authority.to_owned()),
    ];
    for (file, text) in files {
        std::fs::write(folder.join(file), text).expect("write");
    }
}

/// The clock stands still except while everybody waits, so this takes no time.
#[tokio::test(start_paused = true)]
async fn an_agent_notices_a_server_that_disappears() {
    let mut params = CertificateParams::new([]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("key");
    let authority = params.self_signed(&key).expect("sign").pem();
    let issuer = Issuer::new(params, key);
    let mk_tls = |name: &str| {
        let folder = TempDir::new().expect("a folder");
        write(folder.path(), &issuer, &authority, name);
        Tls::load(Files::in_dirs(folder.path(), folder.path())).expect("certificates")
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut connections = incoming(listener, mk_tls(SERVER_NAME));
    let connector = Connector::new(mk_tls("margay:node:n1"), "service", SERVER_NAME);
    let connector = connector.expect("a name");
    let (channel, silent) =
        tokio::join!(Connect::connect(&connector, &address), connections.next());
    let silent = silent.expect("a connection").expect("its handshake");
    let started = Instant::now();
    let (_up, outgoing) = mpsc::channel(1);
    let mut client = SyncClient::new(channel.expect("a connection"));
    let answer = client.sync(ReceiverStream::new(outgoing)).await;
    assert!(answer.is_err(), "a server that is not there answers");
    assert!(
        started.elapsed() <= Duration::from_secs(30),
        "{:?}",
        started.elapsed()
    );
    drop(silent);
}
