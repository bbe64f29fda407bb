//! Which replica of typha to try next. No I/O.
//!
//! A replica tells its nodes which others are ready, and the order in which each node is to try
//! them. The Service comes last: behind it is any replica, and it is the only one known at first.

use std::collections::BTreeSet;

/// Servers kept of a list, which is a few for each thousand nodes.
const MAX_SERVERS: usize = 64;

/// Servers in order of preference, and those that have failed since one served.
#[derive(Debug)]
pub struct Servers {
    /// Address of the Service.
    service: String,
    ranked: Vec<String>,
    /// Servers that ended a stream, refused one or could not be reached.
    tried: BTreeSet<String>,
    /// All have been tried: whichever answers may do so, although others were preferable.
    is_exhausted: bool,
}

/// The next attempt.
#[derive(Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Server to connect to.
    pub server: String,
    /// The server may refuse in favour of others.
    pub has_alternatives: bool,
}

impl Servers {
    /// Creates a list of the Service alone.
    pub fn new(service: &str) -> Self {
        Self {
            service: service.to_owned(),
            ranked: Vec::new(),
            tried: BTreeSet::new(),
            is_exhausted: false,
        }
    }

    /// The first server that was not tried yet. Once all were, they are tried again in order.
    pub fn next(&mut self) -> Attempt {
        if self.untried().is_none() {
            self.tried.clear();
            self.is_exhausted = true;
        }
        Attempt {
            server: self.untried().unwrap_or(&self.service).to_owned(),
            has_alternatives: !self.is_exhausted,
        }
    }

    /// Sets the servers in order of preference; an empty list changes nothing.
    pub fn set(&mut self, servers: impl IntoIterator<Item = String>) {
        let mut servers = servers.into_iter().take(MAX_SERVERS).peekable();
        if servers.peek().is_some() {
            self.ranked = servers.collect();
        }
    }

    /// Records that a server has sent the view: from now on all may be tried again.
    pub fn record_served(&mut self) {
        self.tried.clear();
        self.is_exhausted = false;
    }

    /// Records that the stream of a server has ended, or was not opened.
    pub fn record_end(&mut self, server: &str) {
        self.tried.insert(server.to_owned());
    }

    fn untried(&self) -> Option<&str> {
        let all = self.ranked.iter().chain([&self.service]);
        all.map(String::as_str)
            .find(|server| !self.tried.contains(*server))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attempts until the list is exhausted, each of which fails; the last one is marked.
    fn round(servers: &mut Servers) -> Vec<String> {
        let mut round = Vec::new();
        loop {
            let Attempt {
                server,
                has_alternatives,
            } = servers.next();
            servers.record_end(&server);
            if !has_alternatives {
                round.push(format!("{server} whatever it knows"));
                return round;
            }
            round.push(server);
        }
    }

    #[test]
    fn the_service_is_the_last_server_and_after_all_of_them_any_may_answer() {
        let mut servers = Servers::new("service");
        assert_eq!(
            round(&mut servers),
            ["service", "service whatever it knows"]
        );
        servers.record_served();
        servers.set(["b".to_owned(), "a".to_owned()]);
        servers.set([]);
        assert_eq!(
            round(&mut servers),
            ["b", "a", "service", "b whatever it knows"]
        );
        let next = servers.next();
        assert_eq!(
            (&*next.server, next.has_alternatives),
            ("a", false),
            "until one serves"
        );
    }

    #[test]
    fn a_server_that_sends_the_node_away_is_not_the_next_one() {
        let mut servers = Servers::new("service");
        servers.set(["a", "b"].map(str::to_owned));
        assert_eq!(servers.next().server, "a");
        servers.record_served();
        servers.record_end("a");
        assert_eq!(servers.next().server, "b");
        servers.set(["c", "a"].map(str::to_owned));
        assert_eq!(servers.next().server, "c", "the newest list counts");
        servers.record_served();
        assert_eq!(servers.next().server, "c");
    }
}
