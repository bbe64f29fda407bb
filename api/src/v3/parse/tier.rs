//! Parses tiers.

use crate::policy::{self, Order};
use crate::problem::{Problems, Refusal};
use crate::rule::Action;
use crate::v3::tier::Tier;

/// Parses a tier. A tier whose default action is not known denies.
pub fn tier(tier: &Tier) -> Result<policy::Tier, Refusal<policy::Tier>> {
    let mut problems = Problems::default();
    let default_action = match tier.spec.default_action.as_str() {
        "Deny" | "" => Action::Deny,
        "Pass" => Action::Pass,
        other => {
            problems.add(
                "spec.defaultAction",
                other,
                "not an action for the end of a tier",
                "use Deny or Pass",
            );
            Action::Deny
        }
    };
    let parsed = policy::Tier {
        order: Order(tier.spec.order),
        default_action,
    };
    problems.finish(parsed, Some)
}
