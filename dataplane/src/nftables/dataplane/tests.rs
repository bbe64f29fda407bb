//! nftables over a kernel as a value does what every implementation does.

use margay_nft::{Hook, Ruleset};

use super::*;
use crate::conformance::{Subject, Way};
use crate::nftables::model::Model;
use crate::nftables::simulate::{self, Packet};

struct Simulated {
    dataplane: Nftables,
    kernel: Model,
}

impl Simulated {
    fn table(&self) -> Ruleset {
        self.kernel.table().expect("a commit was made")
    }
}

impl Subject for Simulated {
    type State = Ruleset;

    fn new(node: &str) -> Self {
        let kernel = Model::new();
        Self {
            dataplane: Nftables::new(node, Box::new(kernel.clone())),
            kernel,
        }
    }

    fn dataplane(&mut self) -> &mut dyn Dataplane {
        &mut self.dataplane
    }

    fn state(&self) -> Ruleset {
        let table = self.table();
        assert_eq!(table.check(), Ok(()));
        table
    }

    fn travel(&self, packet: &Packet, way: Way) -> (bool, Vec<String>) {
        let hooks = match way {
            Way::ToHost => [Hook::Prerouting, Hook::Input],
            Way::Forwarded => [Hook::Prerouting, Hook::Forward],
            Way::FromHost => [Hook::Output, Hook::Postrouting],
        };
        simulate::travel(&self.table(), packet, &hooks)
    }

    fn damage(&mut self) {
        self.kernel
            .lock()
            .table
            .as_mut()
            .expect("a commit was made")
            .chains
            .pop_last();
    }
}

crate::conformance!(Simulated);
