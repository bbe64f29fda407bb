//! Our own certificate authority: what is stored of it, and when which certificate is due. Pure; [`sign`] makes keys and signatures.
//!
//! A new authority is trusted by everybody before anything is signed with it, and the old one stays trusted until it ends, so that no rotation
//! breaks a connection. Daemons read their files again when they change; nothing is restarted.

pub mod secret;
pub mod sign;

use jiff::{SignedDuration, Timestamp};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::pem::parse_x509_pem;

/// Life of an authority.
pub const CA_LIFE: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);
/// Life of a component's certificate.
pub const LEAF_LIFE: SignedDuration = SignedDuration::from_hours(90 * 24);
/// Longest life of a node's certificate; the agent renews it at two thirds.
pub const NODE_LIFE: SignedDuration = SignedDuration::from_hours(30 * 24);
/// How long a new authority is only trusted before it signs: a day, many times what a ConfigMap takes to reach every pod.
const SPREAD: SignedDuration = SignedDuration::from_hours(24);

/// Secret (in the operator's namespace) and ConfigMap (in the components' namespace) of the authority.
pub const CA_NAME: &str = "margay-ca";
/// Name of the Secret with typha's certificate.
pub const TYPHA_SECRET: &str = "margay-typha-tls";
/// Name of the Secret with the certificate for debugging by hand.
pub const READER_SECRET: &str = "margay-reader-tls";

/// A certificate and its key, both PEM. Debug output shows neither.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pair(..)")
    }
}

/// What the Secret of the authority holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// Signs.
    pub current: Pair,
    /// Trusted already, signs later.
    pub next: Option<Pair>,
    /// Signs no more, trusted still (certificate only).
    pub previous: Option<String>,
}

impl Authority {
    /// Everything that is trusted, as one PEM text.
    pub fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|pair| pair.certificate.as_str());
        [Some(self.current.certificate.as_str()), next, self.previous.as_deref()]
            .into_iter()
            .flatten()
            .map(|pem| format!("{}\n", pem.trim_end()))
            .collect()
    }
}

/// What is stored of certificates.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    /// The authority and the version of its Secret; none if there is no Secret.
    pub authority: Option<(Authority, String)>,
    /// The Secret of the authority is there and cannot be used: why.
    pub broken: Option<String>,
    /// Certificate in typha's Secret.
    pub typha: Option<String>,
    /// Certificate in the reader's Secret.
    pub reader: Option<String>,
}

/// A certificate that a component should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Name of its Secret.
    pub secret: &'static str,
    /// Common name.
    pub common_name: &'static str,
    /// Organization, if any.
    pub organization: Option<&'static str>,
    /// DNS names, in order.
    pub dns_names: &'static [&'static str],
}

/// Typha's certificate.
pub const TYPHA: Leaf = Leaf {
    secret: TYPHA_SECRET,
    common_name: "margay-typha",
    organization: None,
    dns_names: &["margay-typha", "margay-typha.margay-system.svc"],
};

/// The certificate of a person or tool that reads debug services.
pub const READER: Leaf =
    Leaf { secret: READER_SECRET, common_name: "margay:reader", organization: Some("margay:readers"), dns_names: &[] };

/// A PEM text that is no certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a certificate in PEM: {0}")]
pub struct Unreadable(String);

/// What decisions need to know of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until.
    pub not_after: Timestamp,
    /// Common name, empty if none.
    pub common_name: String,
    /// Organization, empty if none.
    pub organization: String,
    /// DNS names in order.
    pub dns_names: Vec<String>,
    /// Identifier of its key.
    pub subject_key: Vec<u8>,
    /// Identifier of the key that signed it.
    pub authority_key: Vec<u8>,
}

impl Facts {
    /// Reads the first certificate of a PEM text.
    pub fn parse(pem: &str) -> Result<Self, Unreadable> {
        let (_, block) = parse_x509_pem(pem.as_bytes()).map_err(|error| Unreadable(error.to_string()))?;
        let certificate = block.parse_x509().map_err(|error| Unreadable(error.to_string()))?;
        let time = |seconds| Timestamp::from_second(seconds).map_err(|error| Unreadable(error.to_string()));
        let mut facts = Self {
            not_before: time(certificate.validity().not_before.timestamp())?,
            not_after: time(certificate.validity().not_after.timestamp())?,
            common_name: first(certificate.subject().iter_common_name()),
            organization: first(certificate.subject().iter_organization()),
            dns_names: Vec::new(),
            subject_key: Vec::new(),
            authority_key: Vec::new(),
        };
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => {
                    facts.dns_names = names.general_names.iter().filter_map(dns_name).collect();
                }
                ParsedExtension::SubjectKeyIdentifier(id) => facts.subject_key = id.0.to_vec(),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    if let Some(id) = &id.key_identifier {
                        facts.authority_key = id.0.to_vec();
                    }
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    /// Whether less than a third of its life is left.
    fn is_ending(&self, now: Timestamp) -> bool {
        now >= self.renewal()
    }

    /// When two thirds of its life are over.
    fn renewal(&self) -> Timestamp {
        let life = self.not_after.duration_since(self.not_before);
        self.not_after.checked_sub(life / 3).unwrap_or(self.not_after)
    }
}

fn first<'a>(mut values: impl Iterator<Item = &'a x509_parser::x509::AttributeTypeAndValue<'a>>) -> String {
    values.next().and_then(|value| value.as_str().ok()).unwrap_or_default().to_owned()
}

fn dns_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    }
}

/// The next change of the authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// None is due.
    Keep,
    /// There is none, or it has ended: make one.
    Create,
    /// It ends in a while: make its successor, which is trusted from now on.
    Prepare,
    /// The successor is known everywhere: it signs from now on.
    Promote,
    /// The predecessor has ended: trust it no more.
    Retire,
}

/// Which step is due now.
pub fn step(authority: Option<&Authority>, now: Timestamp) -> Result<Step, Unreadable> {
    let Some(authority) = authority else {
        return Ok(Step::Create);
    };
    let current = Facts::parse(&authority.current.certificate)?;
    if current.not_after <= now {
        return Ok(match &authority.next {
            Some(_) => Step::Promote,
            None => Step::Create,
        });
    }
    if let Some(previous) = &authority.previous
        && Facts::parse(previous)?.not_after <= now
    {
        return Ok(Step::Retire);
    }
    match &authority.next {
        Some(next) => {
            let known = Facts::parse(&next.certificate)?.not_before + SPREAD;
            Ok(if known <= now { Step::Promote } else { Step::Keep })
        }
        None if current.is_ending(now) => Ok(Step::Prepare),
        None => Ok(Step::Keep),
    }
}

/// Why a certificate has to be made (again), if it has to.
pub fn due(leaf: &Leaf, stored: Option<&str>, authority: &Facts, now: Timestamp) -> Option<&'static str> {
    let Some(pem) = stored else {
        return Some("there is none");
    };
    let Ok(facts) = Facts::parse(pem) else {
        return Some("it cannot be read");
    };
    if facts.authority_key != authority.subject_key {
        return Some("another authority signed it");
    }
    if facts.common_name != leaf.common_name
        || facts.organization != leaf.organization.unwrap_or_default()
        || facts.dns_names != leaf.dns_names
    {
        return Some("it is for other names");
    }
    facts.is_ending(now).then_some("less than a third of its life is left")
}

/// When to look again: the earliest moment at which a step or a renewal can become due.
pub fn next_look(stored: &Stored, now: Timestamp) -> Timestamp {
    let mut moments = vec![now + SignedDuration::from_hours(24)];
    if let Some((authority, _)) = &stored.authority {
        let current = Facts::parse(&authority.current.certificate);
        moments.extend(current.map(|facts| facts.renewal()));
        if let Some(next) = &authority.next {
            moments.extend(Facts::parse(&next.certificate).map(|facts| facts.not_before + SPREAD));
        }
        if let Some(previous) = &authority.previous {
            moments.extend(Facts::parse(previous).map(|facts| facts.not_after));
        }
    }
    for pem in [&stored.typha, &stored.reader].into_iter().flatten() {
        moments.extend(Facts::parse(pem).map(|facts| facts.renewal()));
    }
    moments.into_iter().filter(|moment| *moment > now).min().unwrap_or(now)
}

#[cfg(test)]
#[path = "certs/tests.rs"]
mod tests;
