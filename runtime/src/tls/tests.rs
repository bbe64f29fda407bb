use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;

use futures::StreamExt;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use rustls::crypto::ring;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;
use tonic::transport::server::Connected;
use tower::ServiceExt;

use super::*;
use crate::grpc::{Admission, Trace};

const SERVER: &str = "margay-typha";

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new([]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "margay-ca");
        let key = KeyPair::generate().expect("key");
        let pem = params.self_signed(&key).expect("sign").pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Certificate and key in PEM.
    fn issue(&self, name: &str, organization: &str, until: i32) -> (String, String) {
        let mut params = CertificateParams::new([name.replace(':', "-")]).expect("params");
        params.distinguished_name.push(DnType::CommonName, name);
        if !organization.is_empty() {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization);
        }
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.issuer).expect("sign");
        (certificate.pem(), key.serialize_pem())
    }
}

/// A folder with `tls.crt`, `tls.key` and `ca.crt`.
struct Folder(TempDir);

impl Folder {
    fn new(authority: &Authority, name: &str, organization: &str) -> Self {
        let folder = Self(TempDir::new().expect("folder"));
        folder.write(&authority.issue(name, organization, 2100), &authority.pem);
        folder
    }

    fn write(&self, (certificate, key): &(String, String), authorities: &str) {
        for (name, text) in [
            ("tls.crt", certificate),
            ("tls.key", key),
            ("ca.crt", &authorities.to_owned()),
        ] {
            fs::write(self.0.path().join(name), text).expect("write");
        }
    }

    fn files(&self) -> Files {
        Files::in_dirs(self.0.path(), self.0.path())
    }

    fn tls(&self) -> Tls {
        Tls::load_checking(self.files(), Duration::ZERO).expect("usable files")
    }
}

async fn listen(tls: Tls, handshakes: usize) -> (SocketAddr, Incoming) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    (
        address,
        incoming::start(listener, tls, handshakes, HANDSHAKE),
    )
}

fn connector(tls: Tls, address: SocketAddr) -> Connector {
    Connector::new(tls, &address.to_string(), SERVER).expect("name")
}

/// Returns the refusal, of which a client learns when it reads (TLS 1.3, RFC 8446 section 4.4).
async fn refusal(connector: &Connector) -> String {
    match connector.connect().await {
        Err(error) => error.to_string(),
        Ok(mut stream) => match stream.read_u8().await {
            Ok(_) => panic!("the server accepted a peer that it must refuse"),
            Err(error) => error.to_string(),
        },
    }
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let ca = Authority::new();
    let server = Folder::new(&ca, SERVER, "");
    let client = Folder::new(&ca, "margay:node:n1", "margay:nodes");
    let (address, mut incoming) = listen(server.tls(), 4).await;
    let connector = connector(client.tls(), address);
    let (near, far) = tokio::join!(connector.connect(), incoming.next());
    let (mut near, mut far) = (near.expect("client"), far.expect("open").expect("server"));
    let peer = Peer {
        common_name: "margay:node:n1".to_owned(),
        organization: "margay:nodes".to_owned(),
    };
    assert_eq!(far.connect_info(), peer);
    assert_eq!(near.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    near.write_all(b"x").await.expect("write");
    assert_eq!(far.read_u8().await.expect("read"), b'x');
}

#[tokio::test]
async fn peers_without_our_certificate_are_refused() {
    let ca = Authority::new();
    let server = Folder::new(&ca, SERVER, "");
    let (address, mut incoming) = listen(server.tls(), 4).await;

    let foreign = Authority::new();
    let stranger = Folder::new(&ca, "x", "");
    stranger.write(
        &foreign.issue("margay:node:n1", "margay:nodes", 2100),
        &ca.pem,
    );
    let error = refusal(&connector(stranger.tls(), address)).await;
    assert!(
        error.contains("UnknownCA") || error.contains("DecryptError"),
        "{error}"
    );

    let late = Folder::new(&ca, "x", "");
    late.write(&ca.issue("margay:node:n1", "margay:nodes", 2021), &ca.pem);
    let error = refusal(&connector(late.tls(), address)).await;
    assert!(error.contains("CertificateExpired"), "{error}");

    let mut roots = rustls::RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(ca.pem.as_bytes()).expect("pem");
    roots.add(root).expect("root");
    let nobody = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await.expect("connect");
    let name = ServerName::try_from(SERVER).expect("name");
    let error = match tokio_rustls::TlsConnector::from(Arc::new(nobody))
        .connect(name, stream)
        .await
    {
        Ok(mut stream) => stream.read_u8().await.expect_err("refused").to_string(),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("CertificateRequired"), "{error}");

    // None of them has reached the server: the first that does is this one.
    let friend = Folder::new(&ca, "margay:reader", "margay:readers");
    let connector = connector(friend.tls(), address);
    let (near, far) = tokio::join!(connector.connect(), incoming.next());
    near.expect("client");
    assert_eq!(
        far.expect("open")
            .expect("server")
            .connect_info()
            .common_name,
        "margay:reader"
    );
}

#[tokio::test]
async fn a_client_refuses_a_server_of_another_name_or_ca() {
    let ca = Authority::new();
    let client = Folder::new(&ca, "margay:node:n1", "margay:nodes");
    let other_name = Folder::new(&ca, "margay-other", "");
    let (address, _incoming) = listen(other_name.tls(), 4).await;
    let error = connector(client.tls(), address)
        .connect()
        .await
        .expect_err("another name");
    assert!(error.to_string().contains("margay-typha"), "{error}");

    let other_ca = Folder::new(&Authority::new(), SERVER, "");
    let (address, _incoming) = listen(other_ca.tls(), 4).await;
    let error = connector(client.tls(), address)
        .connect()
        .await
        .expect_err("another CA");
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error}");
}

#[tokio::test]
async fn half_open_peers_do_not_block_others() {
    let ca = Authority::new();
    let server = Folder::new(&ca, SERVER, "");
    let client = Folder::new(&ca, "margay:node:n1", "margay:nodes");
    let (address, mut incoming) = listen(server.tls(), 3).await;
    let mut silent = Vec::new();
    // More than there are slots: the oldest ones are given up, and the real peer still gets in.
    for _ in 0..10 {
        silent.push(TcpStream::connect(address).await.expect("connect"));
    }
    let connector = connector(client.tls(), address);
    let (near, far) = tokio::join!(connector.connect(), incoming.next());
    near.expect("client");
    far.expect("open").expect("server");
    assert_eq!(
        silent[0].read_u8().await.expect_err("given up").kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[tokio::test]
async fn a_silent_peer_is_cut_off_in_time() {
    let ca = Authority::new();
    let server = Folder::new(&ca, SERVER, "");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let _incoming = incoming::start(listener, server.tls(), 3, Duration::from_millis(20));
    let mut silent = TcpStream::connect(address).await.expect("connect");
    assert_eq!(
        silent.read_u8().await.expect_err("cut").kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[tokio::test]
async fn renewed_files_are_used_by_the_next_connection() {
    let (ca, next) = (Authority::new(), Authority::new());
    let server = Folder::new(&ca, SERVER, "");
    let client = Folder::new(&ca, "margay:node:n1", "margay:nodes");
    let (server_tls, client_tls) = (server.tls(), client.tls());
    let (address, mut incoming) = listen(server_tls.clone(), 4).await;
    let connector = connector(client_tls.clone(), address);
    let mut reach = async || {
        let (near, far) = tokio::join!(connector.connect(), incoming.next());
        near.expect("client");
        far.expect("open").expect("server").connect_info()
    };
    assert_eq!(reach().await.common_name, "margay:node:n1");

    // The CA is replaced in three steps; every step works with no restart.
    let both = format!("{}{}", ca.pem, next.pem);
    let (old_server, old_client) = (ca.issue(SERVER, "", 2100), ca.issue("old", "", 2100));
    server.write(&old_server, &both);
    client.write(&old_client, &both);
    assert_eq!(reach().await.common_name, "old");
    server.write(&next.issue(SERVER, "", 2100), &both);
    assert_eq!(reach().await.common_name, "old");
    client.write(&next.issue("new", "", 2100), &next.pem);
    assert_eq!(reach().await.common_name, "new");
}

#[tokio::test]
async fn unusable_renewals_leave_the_former_certificate() {
    let ca = Authority::new();
    let folder = Folder::new(&ca, "first", "");
    let tls = folder.tls();
    let path = |name: &str| folder.0.path().join(name);
    for (name, text) in [
        ("tls.crt", ""),
        ("tls.key", "not a key"),
        ("ca.crt", "not a certificate"),
    ] {
        let former = fs::read(path(name)).expect("read");
        fs::write(path(name), text).expect("write");
        assert_eq!(tls.current().leaf.peer.common_name, "first", "{name}");
        fs::remove_file(path(name)).expect("remove");
        assert_eq!(tls.current().leaf.peer.common_name, "first", "{name}");
        fs::write(path(name), former).expect("write");
    }
    // A certificate whose key has not been written yet.
    let second = ca.issue("second", "", 2100);
    fs::write(path("tls.crt"), &second.0).expect("write");
    assert_eq!(tls.current().leaf.peer.common_name, "first");
    fs::write(path("tls.key"), &second.1).expect("write");
    assert_eq!(tls.current().leaf.peer.common_name, "second");
}

#[test]
fn a_mounted_secret_is_swapped_by_its_link() {
    let ca = Authority::new();
    let root = TempDir::new().expect("folder");
    let fill = |version: &str, name: &str| {
        let folder = root.path().join(version);
        fs::create_dir(&folder).expect("create");
        let (certificate, key) = ca.issue(name, "", 2100);
        fs::write(folder.join("tls.crt"), certificate).expect("write");
        fs::write(folder.join("tls.key"), key).expect("write");
        fs::write(folder.join("ca.crt"), &ca.pem).expect("write");
    };
    let point = |version: &str| {
        symlink(version, root.path().join("..tmp")).expect("link");
        fs::rename(root.path().join("..tmp"), root.path().join("..data")).expect("swap");
    };
    fill("..1", "first");
    point("..1");
    for name in ["tls.crt", "tls.key", "ca.crt"] {
        symlink(Path::new("..data").join(name), root.path().join(name)).expect("link");
    }
    let files = Files::in_dirs(root.path(), root.path());
    let tls = Tls::load_checking(files, Duration::ZERO).expect("usable files");
    assert_eq!(tls.current().leaf.peer.common_name, "first");
    fill("..2", "second");
    point("..2");
    assert_eq!(tls.current().leaf.peer.common_name, "second");
}

#[test]
fn errors_name_the_file_and_show_no_key() {
    let ca = Authority::new();
    let folder = Folder::new(&ca, "first", "");
    let files = folder.files();
    let fails = |files: &Files| Tls::load(files.clone()).expect_err("refused").to_string();

    let mut gone = files.clone();
    gone.authorities = folder.0.path().join("gone.crt");
    let error = fails(&gone);
    assert!(
        error.contains("gone.crt") && error.contains("mounted"),
        "{error}"
    );

    let mismatch = ca.issue("second", "", 2100).1;
    fs::write(&files.key, &mismatch).expect("write");
    let error = fails(&files);
    assert!(
        error.contains("tls.crt") && error.contains("KeyMismatch"),
        "{error}"
    );

    fs::write(&files.key, "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n").expect("write");
    let error = fails(&files);
    assert!(
        error.contains("tls.key") && !error.contains("c2VjcmV0"),
        "{error}"
    );
}

#[test]
fn a_subject_must_be_unambiguous() {
    let leaf = |names: &[(DnType, &str)]| {
        let mut params = CertificateParams::new([]).expect("params");
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 1, 31);
        let certificate = params
            .self_signed(&KeyPair::generate().expect("key"))
            .expect("sign");
        Leaf::parse(certificate.der())
    };
    let organization = DnType::CustomDnType(vec![2, 5, 4, 10]);
    let nobody = leaf(&[(DnType::OrganizationName, "margay:nodes")]).expect_err("no CN");
    assert!(nobody.to_string().contains("CN"), "{nobody}");
    let two = leaf(&[
        (DnType::CommonName, "a"),
        (DnType::OrganizationName, "margay:readers"),
        (organization, "margay:nodes"),
    ]);
    assert!(
        two.expect_err("two organizations")
            .to_string()
            .contains("only one O")
    );
    let plain = leaf(&[(DnType::CommonName, "a")]).expect("valid");
    assert_eq!(
        plain.peer,
        Peer {
            common_name: "a".to_owned(),
            organization: String::new()
        }
    );
    assert_eq!(plain.renew_at() - plain.not_before, 20 * 86_400);
}

#[tokio::test]
async fn a_grpc_server_knows_its_callers() {
    let ca = Authority::new();
    let server = Folder::new(&ca, SERVER, "");
    let (address, incoming) = listen(server.tls(), 4).await;
    let rules = Admission::new([("margay:readers", &["grpc.health.v1.Health"][..])]);
    let serving = tonic::transport::Server::builder()
        .layer(Trace)
        .layer(rules)
        .add_routes(tonic::service::Routes::default())
        .serve_with_incoming(incoming);
    tokio::spawn(serving);
    // There is no service behind the rules, so an admitted call is answered Unimplemented.
    let table = [
        ("margay:readers", Code::Unimplemented),
        ("margay:nodes", Code::PermissionDenied),
    ];
    for (organization, wanted) in table {
        let client = Folder::new(&ca, "someone", organization);
        let connector = connector(client.tls(), address);
        let channel = connector
            .endpoint()
            .connect_with_connector(connector.clone())
            .await;
        let request = http::Request::post("/grpc.health.v1.Health/Check")
            .header("content-type", "application/grpc")
            .body(tonic::body::Body::empty())
            .expect("request");
        let response = channel
            .expect("channel")
            .oneshot(request)
            .await
            .expect("answer");
        let status = tonic::Status::from_header_map(response.headers()).expect("status");
        assert_eq!(status.code(), wanted, "{organization}: {status}");
    }
}

/// A new CA has signed none of the existing certificates: a holder that is no longer trusted must
/// request another one.
#[test]
fn a_certificate_that_no_authority_signed_is_recognised() {
    let (old, new) = (Authority::new(), Authority::new());
    let folder = Folder::new(&old, "margay:node:n1", "margay:nodes");
    let tls = folder.tls();
    assert!(tls.current().is_trusted);
    let put = |authorities: String| {
        fs::write(folder.0.path().join("ca.crt"), authorities).expect("write")
    };
    put(format!("{}{}", old.pem, new.pem));
    assert!(
        tls.current().is_trusted,
        "while one is replaced by the other"
    );
    put(new.pem.clone());
    assert!(!tls.current().is_trusted, "the other has never seen it");
    folder.write(&new.issue("margay:node:n1", "margay:nodes", 2021), &new.pem);
    assert!(tls.current().is_trusted, "whatever the time is");
}
