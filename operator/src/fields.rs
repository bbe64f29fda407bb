//! Settings without effect, as TigeraStatus reports them. Pure.

use std::collections::BTreeSet;

use margay_api::fields::{BGP, CONTROLLERS, FELIX, INSTALLATION, IPAM, Ignored, POOL};

use crate::inputs::Inputs;

/// Settings without effect: of the installation and its dataplane, and of address pools. In order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Reported in TigeraStatus `calico`.
    pub calico: BTreeSet<Ignored>,
    /// Reported in TigeraStatus `ippools`.
    pub ippools: BTreeSet<Ignored>,
}

/// Returns the settings without effect.
pub fn report(inputs: &Inputs) -> Report {
    let mut report = Report::default();
    if let Some(request) = &inputs.request {
        INSTALLATION.find_ignored(
            &format!("Installation {}", request.owner.name),
            &request.spec,
            &mut report.calico,
        );
    }
    report
        .calico
        .extend(inputs.ignored.iter().map(|name| Ignored {
            is_unsafe: false,
            object: format!("Installation {name}"),
            field: String::new(),
            meaning:
                "only the Installation named default is used; move its settings there".to_owned(),
        }));
    for (name, spec) in inputs.felix.iter().flatten() {
        FELIX.find_ignored(
            &format!("FelixConfiguration {name}"),
            spec,
            &mut report.calico,
        );
    }
    for (name, spec) in inputs.bgp.iter().flatten() {
        let object = format!("BGPConfiguration {name}");
        BGP.find_ignored(&object, spec, &mut report.calico);
    }
    if let Some(Some(object)) = &inputs.controllers {
        CONTROLLERS.find_ignored(
            "KubeControllersConfiguration default",
            &object["spec"],
            &mut report.calico,
        );
    }
    for pool in inputs.pools.iter().flatten() {
        POOL.find_ignored(
            &format!("IPPool {}", pool.name),
            &pool.spec,
            &mut report.ippools,
        );
    }
    if let Some(spec) = &inputs.ipam {
        IPAM.find_ignored("IPAMConfiguration default", spec, &mut report.ippools);
    }
    report
}

#[cfg(test)]
#[path = "fields_tests.rs"]
mod tests;
