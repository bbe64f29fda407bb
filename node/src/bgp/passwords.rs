//! Passwords of peers: keys of Secrets in the agents' namespace.
//!
//! Users let agents read these Secrets by name, with a Role of their own as with Calico: `get`,
//! `list` and `watch` on `secrets` with their `resourceNames`.

use std::collections::{BTreeMap, BTreeSet};

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use margay_api::bgp::SecretKey;
use margay_bgp::config::Password;
use tokio::sync::watch;
use tokio_stream::StreamMap;
use tokio_stream::wrappers::WatchStream;

/// Values of a Secret by key.
pub type SecretData = BTreeMap<String, Vec<u8>>;
/// A Secret, or why it cannot be read; `None`: it is not known yet.
pub type SecretState = Option<Result<SecretData, String>>;

/// Where Secrets are read.
pub trait SecretSource: Send + Sync + 'static {
    /// Follows a Secret of the agents' namespace until the receiver is dropped.
    fn follow(&self, name: &str) -> watch::Receiver<SecretState>;
}

/// Secrets of the API server, each watched by its name.
pub struct ApiSecrets(pub Client);

impl SecretSource for ApiSecrets {
    fn follow(&self, name: &str) -> watch::Receiver<SecretState> {
        let (sender, receiver) = watch::channel(SecretState::None);
        let secrets: Api<Secret> = Api::default_namespaced(self.0.clone());
        let seen = watcher::watch_object(secrets, name).default_backoff();
        tokio::spawn(publish(seen, sender));
        receiver
    }
}

/// Publishes what is seen of a Secret until nobody listens. An error counts only while nothing is
/// known: sessions do not end because the API server does not answer.
async fn publish(
    seen: impl Stream<Item = Result<Option<Secret>, watcher::Error>>,
    sender: watch::Sender<SecretState>,
) {
    let mut seen = std::pin::pin!(seen);
    loop {
        let found = tokio::select! {
            () = sender.closed() => return,
            found = seen.next() => found,
        };
        let now = match found {
            Some(Ok(Some(secret))) => {
                let data = secret.data.unwrap_or_default().into_iter();
                Ok(data.map(|(key, value)| (key, value.0)).collect())
            }
            Some(Ok(None)) => Err("it does not exist".to_owned()),
            Some(Err(_)) if matches!(*sender.borrow(), Some(Ok(_))) => continue,
            Some(Err(error)) => Err(error.to_string()),
            None => return,
        };
        sender.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&now);
            *known = Some(now);
            is_new
        });
    }
}

/// The Secrets that peers need, followed while they do.
pub(super) struct Passwords<S> {
    source: S,
    states: BTreeMap<String, SecretState>,
    changes: StreamMap<String, WatchStream<SecretState>>,
}

impl<S: SecretSource> Passwords<S> {
    pub(super) fn new(source: S) -> Self {
        Self {
            source,
            states: BTreeMap::new(),
            changes: StreamMap::new(),
        }
    }

    /// Follows these Secrets and no others.
    pub(super) fn follow(&mut self, keys: &BTreeSet<SecretKey>) {
        let wanted: BTreeSet<&String> = keys.iter().map(|key| &key.name).collect();
        let known: Vec<String> = self.states.keys().cloned().collect();
        for name in known.into_iter().filter(|name| !wanted.contains(name)) {
            self.states.remove(&name);
            self.changes.remove(&name);
        }
        for name in wanted {
            if !self.states.contains_key(name) {
                let state = self.source.follow(name);
                self.states.insert(name.clone(), state.borrow().clone());
                self.changes.insert(name.clone(), WatchStream::new(state));
            }
        }
    }

    /// Waits until a Secret has changed.
    pub(super) async fn changed(&mut self) {
        match self.changes.next().await {
            Some((name, state)) => drop(self.states.insert(name, state)),
            None => std::future::pending().await,
        }
    }

    /// Whether something is not known yet of the Secrets that are followed.
    pub(super) fn is_waiting(&self) -> bool {
        self.states.values().any(Option::is_none)
    }

    /// The password at a key, or what is wrong.
    pub(super) fn find(&self, key: &SecretKey) -> Result<Password, String> {
        let SecretKey { name, key } = key;
        let refuse = |what: &str| {
            Err(format!(
                "its password is key {key} of Secret {name}: {what}"
            ))
        };
        let data = match self.states.get(name) {
            Some(Some(Ok(data))) => data,
            Some(Some(Err(reason))) => {
                return refuse(&format!(
                    "{reason}; create it in the agents' namespace, and let agents get, list and \
                     watch it by a Role"
                ));
            }
            _ => return refuse("it has not been read yet"),
        };
        let Some(value) = data.get(key) else {
            return refuse("the Secret has no such key");
        };
        let text = String::from_utf8(value.clone());
        let password = text
            .map_err(|_| "it is not UTF-8".to_owned())
            .and_then(|text| {
                // A file that the Secret was made from ends with a new line.
                let text = text.trim_end_matches(['\r', '\n']).to_owned();
                Password::new(text).map_err(|error| error.to_string())
            });
        password.or_else(|reason| refuse(&reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fixed(BTreeMap<String, watch::Sender<SecretState>>);

    impl SecretSource for Fixed {
        fn follow(&self, name: &str) -> watch::Receiver<SecretState> {
            self.0[name].subscribe()
        }
    }

    fn key(name: &str, key: &str) -> SecretKey {
        let (name, key) = (name.to_owned(), key.to_owned());
        SecretKey { name, key }
    }

    #[tokio::test]
    async fn a_password_is_what_its_key_has_or_a_reason() {
        let long = vec![b'x'; 81];
        let data: SecretData = [
            ("good", b"moss-and-stone\n".to_vec()),
            ("empty", Vec::new()),
            ("long", long),
            ("binary", vec![0xff]),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        let source = Fixed::default();
        let mut source = source;
        for (name, state) in [
            ("bgp", Some(Ok(data.clone()))),
            ("gone", Some(Err("it does not exist".to_owned()))),
            ("new", None),
        ] {
            source.0.insert(name.to_owned(), watch::Sender::new(state));
        }
        let late = source.0["new"].clone();
        let mut passwords = Passwords::new(source);
        passwords.follow(&["bgp", "gone", "new"].map(|name| key(name, "")).into());
        assert!(passwords.is_waiting());
        for (name, wanted, part) in [
            ("bgp/good", Some("moss-and-stone"), ""),
            ("bgp/none", None, "no such key"),
            ("bgp/empty", None, "1 to 80 bytes"),
            ("bgp/long", None, "1 to 80 bytes"),
            ("bgp/binary", None, "not UTF-8"),
            ("gone/good", None, "does not exist; create it"),
            ("new/good", None, "not been read yet"),
            ("other/good", None, "not been read yet"),
        ] {
            let (secret, at) = name.split_once('/').expect("two parts");
            let found = passwords.find(&key(secret, at));
            match (found, wanted) {
                (Ok(found), Some(wanted)) => assert_eq!(found.reveal(), wanted),
                (Err(reason), None) => assert!(reason.contains(part), "{name}: {reason}"),
                (found, _) => panic!("{name}: {found:?}"),
            }
        }
        late.send_replace(Some(Ok(data)));
        while passwords.is_waiting() {
            passwords.changed().await;
        }
        assert!(passwords.find(&key("new", "good")).is_ok());
        passwords.follow(&BTreeSet::new());
        assert!(passwords.find(&key("new", "good")).is_err());
        assert_eq!(late.receiver_count(), 0, "it is not followed any more");
    }
}
