//! Makes keys and issues certificates.

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SerialNumber,
};
use sha2::{Digest, Sha256};
use x509_parser::time::ASN1Time;

use super::{Authority, CA_LIFE, CertificateFacts, LEAF_LIFE, Leaf, NODE_LIFE, Pair, Step};

/// Tolerance for clocks of nodes that are behind ours.
const SKEW: SignedDuration = SignedDuration::from_mins(5);

/// Reasons why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// Error of the library.
    #[error("certificate {name}: {source}")]
    Library {
        /// Common name.
        name: String,
        /// Cause.
        source: rcgen::Error,
    },
    /// The CA cannot be read.
    #[error("CA in Secret margay-operator/margay-ca: {0}; delete the Secret to create a new CA")]
    Authority(#[from] super::CertificateError),
    /// A time that X.509 cannot express.
    #[error("time {0} does not fit in a certificate; correct the clock of this machine")]
    Time(Timestamp),
}

/// Contents of a certificate besides the key.
struct Contents<'a> {
    common_name: &'a str,
    organization: Option<&'a str>,
    dns_names: &'a [&'a str],
    not_before: Timestamp,
    not_after: Timestamp,
}

/// Applies a step to the stored CA. [`Step::Keep`] returns it unchanged.
pub fn advance(
    stored: Option<&Authority>,
    step: Step,
    now: Timestamp,
) -> Result<Authority, IssueError> {
    let Some(stored) = stored.filter(|_| step != Step::Create) else {
        return Ok(Authority {
            current: new_authority(now)?,
            next: None,
            previous: None,
        });
    };
    let mut authority = stored.clone();
    match step {
        Step::Keep | Step::Create => {}
        Step::Prepare => authority.next = Some(new_authority(now)?),
        Step::Promote => {
            if let Some(next) = authority.next.take() {
                let old = std::mem::replace(&mut authority.current, next);
                authority.previous = Some(old.certificate);
            }
        }
        Step::Retire => authority.previous = None,
    }
    Ok(authority)
}

/// Makes a self-signed CA, valid from now.
fn new_authority(now: Timestamp) -> Result<Pair, IssueError> {
    let key = new_key("margay")?;
    let contents = Contents {
        common_name: "margay",
        organization: None,
        dns_names: &[],
        not_before: now,
        not_after: now + CA_LIFE,
    };
    let mut params = params(&contents, &key)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = false;
    let certificate = params.self_signed(&key).map_err(library("margay"))?;
    Ok(Pair {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// Makes a key and a certificate for a component.
pub fn leaf(authority: &Authority, leaf: &Leaf, now: Timestamp) -> Result<Pair, IssueError> {
    let key = new_key(leaf.common_name)?;
    let contents = Contents {
        common_name: leaf.common_name,
        organization: leaf.organization,
        dns_names: leaf.dns_names,
        not_before: now - SKEW,
        not_after: now + LEAF_LIFE,
    };
    Ok(Pair {
        certificate: end_entity(authority, &contents, &key)?,
        key: key.serialize_pem(),
    })
}

/// Signs a node's key. Only the key is taken from the request.
pub fn node(
    authority: &Authority,
    name: &str,
    key: &impl PublicKeyData,
    life: SignedDuration,
    now: Timestamp,
) -> Result<String, IssueError> {
    let contents = Contents {
        common_name: &format!("{}{name}", crate::names::COMMON_NAME_PREFIX),
        organization: Some(crate::names::ORGANIZATION),
        dns_names: &[crate::names::DNS_NAME],
        not_before: now - SKEW,
        not_after: now + life.min(NODE_LIFE),
    };
    end_entity(authority, &contents, key)
}

fn end_entity(
    authority: &Authority,
    contents: &Contents<'_>,
    key: &impl PublicKeyData,
) -> Result<String, IssueError> {
    let end = CertificateFacts::parse(&authority.current.certificate)?.not_after;
    let name = contents.common_name;
    let ca_key = KeyPair::from_pem(&authority.current.key).map_err(library("margay"))?;
    let issuer = Issuer::from_ca_cert_pem(&authority.current.certificate, ca_key)
        .map_err(library("margay"))?;
    let contents = Contents {
        not_after: contents.not_after.min(end),
        ..*contents
    };
    let mut params = params(&contents, key)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(key, &issuer).map_err(library(name))?;
    Ok(certificate.pem())
}

fn params(
    contents: &Contents<'_>,
    key: &impl PublicKeyData,
) -> Result<CertificateParams, IssueError> {
    let names: Vec<String> = contents.dns_names.iter().map(|n| (*n).to_owned()).collect();
    let mut params = CertificateParams::new(names).map_err(library(contents.common_name))?;
    params.distinguished_name = DistinguishedName::new();
    if let Some(organization) = contents.organization {
        params
            .distinguished_name
            .push(DnType::OrganizationName, organization);
    }
    params
        .distinguished_name
        .push(DnType::CommonName, contents.common_name);
    let time = |moment: Timestamp| {
        ASN1Time::from_timestamp(moment.as_second())
            .map(|time| time.to_datetime())
            .map_err(|_| IssueError::Time(moment))
    };
    params.not_before = time(contents.not_before)?;
    params.not_after = time(contents.not_after)?;
    params.serial_number = Some(serial(contents, key.der_bytes()));
    Ok(params)
}

/// Returns a serial number that differs whenever key or time does: 127 bits of a digest.
fn serial(contents: &Contents<'_>, key: &[u8]) -> SerialNumber {
    let digest = Sha256::new()
        .chain_update(key)
        .chain_update(contents.not_before.as_nanosecond().to_be_bytes())
        .chain_update(contents.common_name)
        .finalize();
    let mut bytes = digest[..16].to_vec();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

fn new_key(name: &str) -> Result<KeyPair, IssueError> {
    KeyPair::generate().map_err(library(name))
}

fn library(name: &str) -> impl FnOnce(rcgen::Error) -> IssueError {
    let name = name.to_owned();
    |source| IssueError::Library { name, source }
}
