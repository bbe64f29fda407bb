//! Certificates of nodes: decides on CertificateSigningRequests for our signer. Pure; [`crate::signer`] carries the verdicts out.
//!
//! A node's key never leaves the node, and a node can only ever get a certificate of its own name: the API server puts the node that a pod's
//! token is bound to into the request, where the requester cannot change it.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, PublicKey, SanType,
};

use crate::certs::NODE_LIFE;

/// The signer that requests have to name.
pub const SIGNER: &str = "margay.io/node";
/// The only requester: the agents' service account.
pub const REQUESTER: &str = "system:serviceaccount:margay-system:margay-node";
/// Where the API server says which node a pod's token is bound to.
pub const NODE_EXTRA: &str = "authentication.kubernetes.io/node-name";
/// Common name of a node's certificate, before the node's name.
pub const COMMON_NAME_PREFIX: &str = "margay:node:";
/// Organization of nodes' certificates.
pub const ORGANIZATION: &str = "margay:nodes";
/// The one DNS name of nodes' certificates.
pub const DNS_NAME: &str = "margay-node";
/// Usages that a request has to list, all of them and no other.
const USAGES: [&str; 3] = ["client auth", "digital signature", "server auth"];

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: it is for another signer, or decided and done.
    Ignore,
    /// It breaks a rule: deny it, with the rule.
    Deny(String),
    /// It was approved by somebody else and breaks a rule: mark it failed, with the rule.
    Fail(String),
    /// It is right: approve it.
    Approve,
    /// It is right and approved: sign it.
    Sign(Grant),
}

/// What may be signed.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// The node.
    pub node: String,
    /// Its public key.
    pub key: PublicKey,
    /// How long.
    pub life: SignedDuration,
}

/// Decides on one request.
pub fn decide(request: &CertificateSigningRequest) -> Verdict {
    let status = request.status.clone().unwrap_or_default();
    let has = |kind: &str| {
        let conditions = status.conditions.iter().flatten();
        conditions.into_iter().any(|c| c.type_ == kind)
    };
    let issued = status.certificate.is_some_and(|bytes| !bytes.0.is_empty());
    if request.spec.signer_name != SIGNER || issued || has("Denied") || has("Failed") {
        return Verdict::Ignore;
    }
    match (check(request), has("Approved")) {
        (Ok(grant), true) => Verdict::Sign(grant),
        (Ok(_), false) => Verdict::Approve,
        (Err(rule), true) => Verdict::Fail(rule),
        (Err(rule), false) => Verdict::Deny(rule),
    }
}

/// Every rule of a request, or the first one that it breaks.
fn check(request: &CertificateSigningRequest) -> Result<Grant, String> {
    let spec = &request.spec;
    let user = spec.username.as_deref().unwrap_or_default();
    if user != REQUESTER {
        return Err(format!("requester {user:?} is not {REQUESTER}; only node agents may ask"));
    }
    let node = bound_node(request)?;
    let usages: BTreeSet<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    if usages != BTreeSet::from(USAGES) {
        return Err(format!("usages {usages:?} have to be exactly {}", USAGES.join(", ")));
    }
    let pem = std::str::from_utf8(&spec.request.0).map_err(|_| "the request is not PEM text")?;
    let parsed = CertificateSigningRequestParams::from_pem(pem)
        .map_err(|error| format!("the request cannot be read or its signature is wrong: {error}"))?;
    contents(&parsed.params, &node)?;
    let strong = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
    if !strong.iter().any(|known| *known == parsed.public_key.algorithm()) {
        return Err("the key has to be ECDSA P-256, P-384 or Ed25519".to_owned());
    }
    let asked = spec.expiration_seconds.map(|seconds| SignedDuration::from_secs(i64::from(seconds)));
    Ok(Grant { node, key: parsed.public_key, life: asked.map_or(NODE_LIFE, |asked| asked.min(NODE_LIFE)) })
}

fn bound_node(request: &CertificateSigningRequest) -> Result<String, String> {
    let bound = request.spec.extra.as_ref().and_then(|extra| extra.get(NODE_EXTRA));
    match bound.map(Vec::as_slice) {
        Some([node]) if !node.is_empty() => Ok(node.clone()),
        _ => Err(format!(
            "the requester's token is not bound to a node ({NODE_EXTRA} is missing); Kubernetes 1.30 or later \
             sets it for tokens of pods"
        )),
    }
}

fn contents(params: &CertificateParams, node: &str) -> Result<(), String> {
    let wanted = format!("{COMMON_NAME_PREFIX}{node}");
    let name = |kind| text(params.distinguished_name.get(&kind));
    let common = name(DnType::CommonName);
    if common.as_deref() != Some(wanted.as_str()) {
        return Err(format!(
            "common name {:?} has to be {wanted:?}, the node that the token is bound to",
            common.unwrap_or_default()
        ));
    }
    let organization = name(DnType::OrganizationName);
    if organization.as_deref() != Some(ORGANIZATION) {
        return Err(format!("organization {:?} has to be {ORGANIZATION:?}", organization.unwrap_or_default()));
    }
    if params.distinguished_name.iter().count() != 2 {
        return Err("the subject has to be common name and organization, nothing else".to_owned());
    }
    let names_ok = matches!(params.subject_alt_names.as_slice(), [SanType::DnsName(name)] if name.as_str() == DNS_NAME);
    if !names_ok {
        return Err(format!("alternative names have to be the DNS name {DNS_NAME}, nothing else"));
    }
    if matches!(params.is_ca, IsCa::Ca(_)) {
        return Err("a node cannot be an authority".to_owned());
    }
    let usages_ok = params.key_usages.iter().all(|usage| *usage == KeyUsagePurpose::DigitalSignature);
    let purposes_ok = params
        .extended_key_usages
        .iter()
        .all(|purpose| matches!(purpose, ExtendedKeyUsagePurpose::ClientAuth | ExtendedKeyUsagePurpose::ServerAuth));
    if usages_ok && purposes_ok {
        Ok(())
    } else {
        Err(format!("the request may ask for no other usages than {}", USAGES.join(", ")))
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
#[path = "csr_tests.rs"]
mod tests;
