//! Searches for secrets in every form in which a program could have written them, including parts.

use std::collections::BTreeMap;

use aho_corasick::AhoCorasick;
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use data_encoding::{HEXLOWER, HEXUPPER};

/// Number of bytes of a secret that count as a leak: fewer could be chance.
const PIECE: usize = 16;
/// What stands before the 32 secret bytes of an elliptic-curve key (RFC 5915): version 1, an octet
/// string.
const BEFORE_SECRET: [u8; 5] = [2, 1, 1, 4, 32];

/// Secrets, under names that can be shown.
#[derive(Default)]
pub struct Canaries {
    forms: BTreeMap<Vec<u8>, String>,
}

/// Looks for all of them at once.
pub struct Search {
    automaton: AhoCorasick,
    names: Vec<String>,
}

impl Canaries {
    /// A secret that is random all over.
    pub fn add(&mut self, name: &str, secret: &[u8]) -> Result<()> {
        ensure!(
            secret.len() >= PIECE,
            "{name} is shorter than {PIECE} bytes: it could be found by chance"
        );
        let tail = &secret[secret.len() - PIECE..];
        for piece in secret.chunks_exact(PIECE).chain([tail]) {
            for form in forms(piece) {
                self.forms.entry(form).or_insert_with(|| name.to_owned());
            }
        }
        Ok(())
    }

    /// A private key in PEM: of that only some bytes are secret, as others are those of the public
    /// key.
    pub fn add_key(&mut self, name: &str, pem: &str) -> Result<()> {
        let body: String = pem
            .lines()
            .filter(|line| !line.starts_with("-----"))
            .map(str::trim)
            .collect();
        let der = STANDARD
            .decode(&body)
            .with_context(|| format!("{name} is not in PEM"))?;
        let at = der
            .windows(BEFORE_SECRET.len())
            .position(|window| window == BEFORE_SECRET);
        let secret = at.and_then(|at| der.get(at + BEFORE_SECRET.len()..)?.get(..32));
        self.add(
            name,
            secret
                .with_context(|| format!("{name} is not a key of a curve with 32 secret bytes"))?,
        )
    }

    /// A token of a service account: without its signature it grants nothing, and its claims are no
    /// secret.
    pub fn add_token(&mut self, name: &str, token: &str) -> Result<()> {
        let (_, signature) = token
            .trim()
            .rsplit_once('.')
            .with_context(|| format!("{name} has no signature"))?;
        self.add(name, signature.as_bytes())
    }

    /// Search for all of them.
    pub fn search(&self) -> Result<Search> {
        let automaton = AhoCorasick::new(self.forms.keys()).context("too many forms")?;
        Ok(Search {
            automaton,
            names: self.forms.values().cloned().collect(),
        })
    }
}

impl Search {
    /// The name of a secret that shows, and where.
    pub fn find(&self, text: &[u8]) -> Option<(&str, usize)> {
        let found = self.automaton.find(text)?;
        Some((&self.names[found.pattern().as_usize()], found.start()))
    }
}

/// Raw, and in base64 as in PEM; and each of these as programs print bytes, or in base64 once more,
/// as in a Secret.
fn forms(piece: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = printed(piece);
    for once in in_base64(piece) {
        forms.extend(printed(once.as_bytes()));
        forms.extend(
            in_base64(once.as_bytes())
                .into_iter()
                .map(String::into_bytes),
        );
    }
    forms
}

/// As they are, and as Rust and JSON print them.
fn printed(bytes: &[u8]) -> Vec<Vec<u8>> {
    let list = |separator: &str| {
        bytes
            .iter()
            .map(u8::to_string)
            .collect::<Vec<_>>()
            .join(separator)
    };
    let escaped = bytes.escape_ascii().to_string();
    let quoted = serde_json::Value::from(escaped.as_str()).to_string();
    let quoted = quoted.trim_matches('"').to_owned();
    let texts = [
        HEXUPPER.encode(bytes),
        HEXLOWER.encode(bytes),
        list(", "),
        list(","),
        quoted,
        escaped,
    ];
    texts
        .into_iter()
        .map(String::into_bytes)
        .chain([bytes.to_owned()])
        .collect()
}

/// The characters that the piece alone decides, for each of three places in a group of base64, in
/// both alphabets.
fn in_base64(piece: &[u8]) -> Vec<String> {
    let at = |before: usize, engine: &dyn Fn(Vec<u8>) -> String| {
        let text = engine([&vec![0; before], piece].concat());
        let decided = (before * 8).div_ceil(6)..(before + piece.len()) * 8 / 6;
        text[decided].to_owned()
    };
    let engines: [&dyn Fn(Vec<u8>) -> String; 2] =
        [&|bytes| STANDARD_NO_PAD.encode(bytes), &|bytes| {
            URL_SAFE_NO_PAD.encode(bytes)
        }];
    engines
        .iter()
        .flat_map(|engine| (0..3).map(|before| at(before, *engine)).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_every_form_and_its_certificate_is_not() -> Result<()> {
        let key = rcgen::KeyPair::generate()?;
        let (pem, der) = (key.serialize_pem(), key.serialize_der());
        let certificate = rcgen::CertificateParams::new(["a".to_owned()])?.self_signed(&key)?;
        let mut canaries = Canaries::default();
        canaries.add_key("the key", &pem)?;
        let search = canaries.search()?;
        for before in 0..3 {
            let moved = [&vec![b'x'; before], pem.as_bytes()].concat();
            let shown = [
                moved.clone(),
                STANDARD.encode(&moved).into_bytes(),
                format!("{moved:?}").into_bytes(),
                serde_json::to_vec(&moved)?,
                format!("{:?}", [&vec![7; before], &der[..]].concat()).into_bytes(),
                serde_json::to_vec(&der)?,
                HEXLOWER.encode(&der).into_bytes(),
                format!("{}", der.escape_ascii()).into_bytes(),
                serde_json::to_vec(&json_text(&der))?,
                pem.as_bytes()[..pem.len() * 2 / 3].to_vec(),
            ];
            for (index, text) in shown.iter().enumerate() {
                ensure!(
                    search.find(text).is_some(),
                    "form {index}, {before} bytes before it"
                );
            }
        }
        let public = [
            certificate.pem(),
            key.public_key_pem(),
            STANDARD.encode(certificate.pem()),
        ];
        ensure!(
            public
                .iter()
                .all(|text| search.find(text.as_bytes()).is_none()),
            "what is public is found"
        );
        Ok(())
    }

    fn json_text(der: &[u8]) -> serde_json::Value {
        serde_json::json!({"key": der.escape_ascii().to_string()})
    }

    #[test]
    fn of_a_token_the_signature_is_secret_and_a_part_of_it_is_enough() -> Result<()> {
        let token = "aGVhZGVyaGVhZGVyaGVhZGVy.cGF5bG9hZHBheWxvYWRwYXlsb2Fk.\
                     0123456789-abcdefghijklmnop_qrstuvwxyzABCDEFGH";
        let mut canaries = Canaries::default();
        canaries.add_token("the token", token)?;
        let search = canaries.search()?;
        let found = |text: &str| search.find(text.as_bytes()).map(|(name, _)| name);
        assert_eq!(found(&format!("Bearer {token}")), Some("the token"));
        assert_eq!(found(&token[..80]), Some("the token"));
        assert_eq!(found(&token[..56]), None);
        assert!(
            canaries.add_token("no token", "abc").is_err()
                && canaries.add("short", b"abc").is_err()
        );
        Ok(())
    }
}
