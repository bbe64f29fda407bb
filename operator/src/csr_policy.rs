//! Decides on CertificateSigningRequests for our signer, by which nodes get their certificates.
//! Pure; [`crate::csr_controller`] carries the decisions out.
//!
//! A node's key never leaves the node, and a node can only get a certificate for its own name: the
//! API server adds to the request the node that the pod's token is bound to, and the requester
//! cannot change it.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose,
    IsCa, KeyUsagePurpose, PublicKey, SanType,
};

use crate::certs::NODE_LIFE;
use crate::names::{COMMON_NAME_PREFIX, DNS_NAME, ORGANIZATION};

/// Signer name that requests must have.
pub const SIGNER: &str = "margay.io/node";
/// The only allowed requester: the agents' service account.
pub const REQUESTER: &str = "system:serviceaccount:margay-system:margay-node";
/// Extra field of the requester's user info with the node that the pod's token is bound to
/// (Kubernetes).
pub const NODE_EXTRA: &str = "authentication.kubernetes.io/node-name";
/// Usages that a request must list, all of them and no other.
const USAGES: [&str; 3] = ["client auth", "digital signature", "server auth"];

/// Decision on a request.
#[derive(Debug, PartialEq, Eq)]
pub enum CsrDecision {
    /// No action: it is for another signer, or complete.
    Ignore,
    /// Deny it, with the rule that it breaks.
    Deny(String),
    /// Mark it failed, with the rule that it breaks: it was approved by somebody else.
    Fail(String),
    /// Approve it.
    Approve,
    /// Sign it: it is valid and approved.
    Sign(Grant),
}

/// Contents of a certificate to sign.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// Name of the node.
    pub node: String,
    /// Public key of the node.
    pub key: PublicKey,
    /// Validity of the certificate.
    pub life: SignedDuration,
}

/// Decides on a request.
pub fn decide(request: &CertificateSigningRequest) -> CsrDecision {
    let status = request.status.clone().unwrap_or_default();
    let has = |kind: &str| {
        let conditions = status.conditions.iter().flatten();
        conditions.into_iter().any(|c| c.type_ == kind)
    };
    let issued = status.certificate.is_some_and(|bytes| !bytes.0.is_empty());
    if request.spec.signer_name != SIGNER || issued || has("Denied") || has("Failed") {
        return CsrDecision::Ignore;
    }
    match (check(request), has("Approved")) {
        (Ok(grant), true) => CsrDecision::Sign(grant),
        (Ok(_), false) => CsrDecision::Approve,
        (Err(rule), true) => CsrDecision::Fail(rule),
        (Err(rule), false) => CsrDecision::Deny(rule),
    }
}

/// Checks every rule; the error is the first one that the request breaks.
fn check(request: &CertificateSigningRequest) -> Result<Grant, String> {
    let spec = &request.spec;
    let user = spec.username.as_deref().unwrap_or_default();
    if user != REQUESTER {
        return Err(format!(
            "requester {user:?} is not {REQUESTER}; only node agents may request certificates"
        ));
    }
    let node = bound_node(request)?;
    let usages: BTreeSet<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    if usages != BTreeSet::from(USAGES) {
        return Err(format!(
            "usages {usages:?} must be exactly {}",
            USAGES.join(", ")
        ));
    }
    let pem = std::str::from_utf8(&spec.request.0).map_err(|_| "the request is not PEM text")?;
    let parsed = CertificateSigningRequestParams::from_pem(pem).map_err(|error| {
        format!("the request cannot be read or its signature is wrong: {error}")
    })?;
    check_contents(&parsed.params, &node)?;
    let strong = [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ];
    if !strong
        .iter()
        .any(|known| *known == parsed.public_key.algorithm())
    {
        return Err("the key must be ECDSA P-256, P-384 or Ed25519".to_owned());
    }
    let requested = spec
        .expiration_seconds
        .map(|seconds| SignedDuration::from_secs(i64::from(seconds)));
    Ok(Grant {
        node,
        key: parsed.public_key,
        life: requested.map_or(NODE_LIFE, |life| life.min(NODE_LIFE)),
    })
}

fn bound_node(request: &CertificateSigningRequest) -> Result<String, String> {
    let bound = request
        .spec
        .extra
        .as_ref()
        .and_then(|extra| extra.get(NODE_EXTRA));
    match bound.map(Vec::as_slice) {
        Some([node]) if !node.is_empty() => Ok(node.clone()),
        _ => Err(format!(
            "the requester's token is not bound to a node ({NODE_EXTRA} is missing); Kubernetes \
             1.30 or later sets it for tokens of pods"
        )),
    }
}

fn check_contents(params: &CertificateParams, node: &str) -> Result<(), String> {
    let wanted = format!("{COMMON_NAME_PREFIX}{node}");
    let name = |kind| text(params.distinguished_name.get(&kind));
    let common = name(DnType::CommonName);
    if common.as_deref() != Some(wanted.as_str()) {
        return Err(format!(
            "common name {:?} must be {wanted:?}, the node that the token is bound to",
            common.unwrap_or_default()
        ));
    }
    let organization = name(DnType::OrganizationName);
    if organization.as_deref() != Some(ORGANIZATION) {
        return Err(format!(
            "organization {:?} must be {ORGANIZATION:?}",
            organization.unwrap_or_default()
        ));
    }
    if params.distinguished_name.iter().count() != 2 {
        return Err(
            "the subject must have a common name and an organization, nothing else".to_owned(),
        );
    }
    let names_ok = matches!(
        params.subject_alt_names.as_slice(),
        [SanType::DnsName(name)] if name.as_str() == DNS_NAME,
    );
    if !names_ok {
        return Err(format!(
            "alternative names must be the DNS name {DNS_NAME}, nothing else"
        ));
    }
    if matches!(params.is_ca, IsCa::Ca(_)) {
        return Err("a node's certificate must not be a CA".to_owned());
    }
    let usages_ok = params
        .key_usages
        .iter()
        .all(|usage| *usage == KeyUsagePurpose::DigitalSignature);
    let purposes_ok = params.extended_key_usages.iter().all(|purpose| {
        matches!(
            purpose,
            ExtendedKeyUsagePurpose::ClientAuth | ExtendedKeyUsagePurpose::ServerAuth
        )
    });
    if usages_ok && purposes_ok {
        Ok(())
    } else {
        Err(format!(
            "the request must have no usages other than {}",
            USAGES.join(", ")
        ))
    }
}

fn text(value: Option<&DnValue>) -> Option<String> {
    match value? {
        DnValue::Utf8String(text) => Some(text.clone()),
        DnValue::PrintableString(text) => Some(text.to_string()),
        DnValue::Ia5String(text) => Some(text.to_string()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "csr_policy_tests.rs"]
mod tests;
