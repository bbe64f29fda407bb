use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequestCondition, CertificateSigningRequestSpec,
    CertificateSigningRequestStatus,
};
use rcgen::{BasicConstraints, DistinguishedName, KeyPair};

use super::*;
use crate::certs::{CertificateFacts, Step, issue};

fn params(common: &str, organization: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, common);
    params
}

fn good_params() -> CertificateParams {
    params("margay:node:n1", "margay:nodes", &["margay-node"])
}

fn pem(params: &CertificateParams) -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    params
        .serialize_request(&key)
        .unwrap()
        .pem()
        .unwrap()
        .into_bytes()
}

/// A request as the agent of node n1 sends it.
fn request(params: &CertificateParams) -> CertificateSigningRequest {
    CertificateSigningRequest {
        spec: CertificateSigningRequestSpec {
            signer_name: SIGNER.to_owned(),
            username: Some(REQUESTER.to_owned()),
            extra: Some(BTreeMap::from([(
                NODE_EXTRA.to_owned(),
                vec!["n1".to_owned()],
            )])),
            usages: Some(USAGES.map(str::to_owned).to_vec()),
            request: ByteString(pem(params)),
            ..CertificateSigningRequestSpec::default()
        },
        ..CertificateSigningRequest::default()
    }
}

fn with_status(
    mut request: CertificateSigningRequest,
    condition: Option<&str>,
    certificate: Option<&str>,
) -> CertificateSigningRequest {
    request.status = Some(CertificateSigningRequestStatus {
        conditions: condition.map(|kind| {
            vec![CertificateSigningRequestCondition {
                type_: kind.to_owned(),
                status: "True".to_owned(),
                ..CertificateSigningRequestCondition::default()
            }]
        }),
        certificate: certificate.map(|text| ByteString(text.as_bytes().to_vec())),
    });
    request
}

fn denied(request: &CertificateSigningRequest) -> String {
    match decide(request) {
        CsrDecision::Deny(rule) => rule,
        other => panic!("{other:?} instead of a denial"),
    }
}

#[test]
fn an_agents_own_request_is_approved_then_signed() {
    let request = request(&good_params());
    assert_eq!(decide(&request), CsrDecision::Approve);
    let CsrDecision::Sign(grant) = decide(&with_status(request, Some("Approved"), None)) else {
        panic!("an approved request is signed");
    };
    assert_eq!((grant.node.as_str(), grant.life), ("n1", NODE_LIFE));
}

#[test]
fn decided_requests_and_those_of_other_signers_are_ignored() {
    let good = request(&good_params());
    for (condition, certificate) in [
        (Some("Denied"), None),
        (Some("Failed"), None),
        (Some("Approved"), Some("PEM")),
    ] {
        let request = with_status(good.clone(), condition, certificate);
        assert_eq!(decide(&request), CsrDecision::Ignore, "{condition:?}");
    }
    let mut other = good;
    other.spec.signer_name = "kubernetes.io/kubelet-serving".to_owned();
    assert_eq!(decide(&other), CsrDecision::Ignore);
}

#[test]
fn a_requester_other_than_an_agent_bound_to_the_node_is_denied() {
    let change = |edit: fn(&mut CertificateSigningRequestSpec)| {
        let mut request = request(&good_params());
        edit(&mut request.spec);
        denied(&request)
    };
    let table = [
        (
            change(|s| s.username = Some("admin".to_owned())),
            "only node agents may request certificates",
        ),
        (
            change(|s| s.username = None),
            "only node agents may request certificates",
        ),
        (change(|s| s.extra = None), "not bound to a node"),
        (
            change(|s| {
                s.extra = Some(BTreeMap::from([(
                    NODE_EXTRA.to_owned(),
                    vec!["n1".to_owned(), "n2".to_owned()],
                )]));
            }),
            "not bound to a node",
        ),
        (
            change(|s| {
                s.extra = Some(BTreeMap::from([(
                    NODE_EXTRA.to_owned(),
                    vec!["n2".to_owned()],
                )]));
            }),
            "common name \"margay:node:n1\" must be \"margay:node:n2\"",
        ),
        (
            change(|s| s.usages = Some(vec!["client auth".to_owned()])),
            "usages",
        ),
        (change(|s| s.usages = None), "usages"),
        (
            change(|s| s.usages.as_mut().unwrap().push("cert sign".to_owned())),
            "usages",
        ),
        (
            change(|s| s.request = ByteString(b"nonsense".to_vec())),
            "cannot be read",
        ),
        (
            change(|s| s.request = ByteString(vec![0xff])),
            "not PEM text",
        ),
    ];
    for (rule, wanted) in table {
        assert!(rule.contains(wanted), "{rule} lacks {wanted}");
    }
}

#[test]
fn a_request_for_anything_but_a_nodes_certificate_is_denied() {
    let edited = |edit: fn(&mut CertificateParams)| {
        let mut params = good_params();
        edit(&mut params);
        params
    };
    let table = [
        (
            params("margay:node:n2", "margay:nodes", &["margay-node"]),
            "common name",
        ),
        (
            params("margay:reader", "margay:readers", &["margay-node"]),
            "common name",
        ),
        (
            params("margay:node:n1", "margay:readers", &["margay-node"]),
            "organization",
        ),
        (
            params("margay:node:n1", "margay:nodes", &[]),
            "alternative names",
        ),
        (
            params("margay:node:n1", "margay:nodes", &["margay-typha"]),
            "alternative names",
        ),
        (
            params("margay:node:n1", "margay:nodes", &["margay-node", "x"]),
            "alternative names",
        ),
        (
            params("margay:node:n1", "margay:nodes", &["10.0.0.1"]),
            "alternative names",
        ),
        (
            edited(|p| p.distinguished_name.push(DnType::CountryName, "DE")),
            "nothing else",
        ),
        (
            edited(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            "must not be a CA",
        ),
        (
            edited(|p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]),
            "no usages other than",
        ),
        (
            edited(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
            "no usages other than",
        ),
    ];
    for (params, wanted) in table {
        let rule = denied(&request(&params));
        assert!(rule.contains(wanted), "{rule} lacks {wanted}");
    }
}

#[test]
fn usages_inside_the_request_may_be_the_right_ones() {
    let mut params = good_params();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    assert_eq!(decide(&request(&params)), CsrDecision::Approve);
}

#[test]
fn a_signature_that_is_not_the_keys_is_denied() {
    let mut request = request(&good_params());
    let text = String::from_utf8(request.spec.request.0.clone()).unwrap();
    let (_, block) = x509_parser::pem::parse_x509_pem(text.as_bytes()).unwrap();
    let mut der = block.contents;
    let last = der.len() - 4;
    der[last] ^= 1;
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let text =
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n");
    request.spec.request = ByteString(text.into_bytes());
    assert!(denied(&request).contains("signature"));
}

#[test]
fn an_approval_by_a_person_does_not_override_the_rules() {
    let params = params("margay:node:n2", "margay:nodes", &["margay-node"]);
    let request = with_status(request(&params), Some("Approved"), None);
    assert!(matches!(decide(&request), CsrDecision::Fail(rule) if rule.contains("common name")));
}

#[test]
fn a_shorter_validity_is_granted_but_not_a_longer_one() {
    for (asked, wanted) in [
        (Some(3600), SignedDuration::from_hours(1)),
        (Some(i32::MAX), NODE_LIFE),
        (None, NODE_LIFE),
    ] {
        let mut request = with_status(request(&good_params()), Some("Approved"), None);
        request.spec.expiration_seconds = asked;
        assert!(matches!(decide(&request), CsrDecision::Sign(grant) if grant.life == wanted));
    }
}

#[test]
fn a_certificate_has_nothing_of_the_request_but_the_key() {
    let now: Timestamp = "2026-11-23T00:00:00Z".parse().unwrap();
    let authority = issue::advance(None, Step::Create, now).unwrap();
    let request = with_status(request(&good_params()), Some("Approved"), None);
    let CsrDecision::Sign(grant) = decide(&request) else {
        panic!("an approved request is signed");
    };
    let pem = issue::node(&authority, &grant.node, &grant.key, grant.life, now).unwrap();
    let facts = CertificateFacts::parse(&pem).unwrap();
    assert_eq!(facts.common_name, "margay:node:n1");
    assert_eq!(facts.organization, "margay:nodes");
    assert_eq!(facts.dns_names, ["margay-node"]);
    assert_eq!(facts.not_after, now + NODE_LIFE);
    let issuer = CertificateFacts::parse(&authority.current.certificate).unwrap();
    assert_eq!(facts.authority_key, issuer.subject_key);
}
