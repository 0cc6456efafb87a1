//! The names of the placement methods.

use crate::PlanError;
use std::{fmt, str::FromStr};

/// How a placement is computed. Each method is a function of its own in the module of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// Blocks of consecutive experts: what engines do by default.
    Contiguous,
    /// Equal random groups, from a seed.
    Random,
    /// Algorithm 1 of the paper, from pairs of experts.
    Greedy,
    /// DeepSeek's EPLB, from loads alone, with replicas.
    Eplb,
    /// Fewest copies on the recorded token sets, under a cap on load.
    Search,
    /// Fewest pairs of a token's experts on one rank: for decoding a few tokens at a time.
    Apart,
}

impl Method {
    /// Every method, in the order in which they are listed to people.
    pub const ALL: [Method; 6] =
        [Method::Contiguous, Method::Random, Method::Greedy, Method::Eplb, Method::Search, Method::Apart];

    /// The name, as in `--method`.
    pub fn name(self) -> &'static str {
        match self {
            Method::Contiguous => "contiguous",
            Method::Random => "random",
            Method::Greedy => "greedy",
            Method::Eplb => "eplb",
            Method::Search => "search",
            Method::Apart => "apart",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Method {
    type Err = PlanError;

    fn from_str(name: &str) -> Result<Self, PlanError> {
        Method::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| {
            let expected = Method::ALL.map(Method::name).join(", ");
            PlanError::range("placement method", format!("one of {expected}"), name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_refused() {
        for method in Method::ALL {
            assert_eq!(method.to_string().parse(), Ok(method));
        }
        let error = "Greedy".parse::<Method>().unwrap_err().to_string();
        assert_eq!(
            error,
            "placement method is Greedy, expected one of contiguous, random, greedy, eplb, search, apart"
        );
    }
}
