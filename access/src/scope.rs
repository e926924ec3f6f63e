//! What a route needs and what a caller has.

use std::fmt;

/// What a caller needs in order to use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Nothing: the probes of an orchestrator, which show nothing but that the server is there.
    Public,
    /// Asking.
    Read,
    /// Sending data.
    Write,
    /// Everything that changes or shows the server itself, and everything that removes data.
    Admin,
}

impl Scope {
    /// The scopes that a credential can have.
    pub const GRANTED: [Self; 3] = [Self::Read, Self::Write, Self::Admin];

    /// The name in credential files and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The scopes of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes(u8);

impl Scopes {
    /// Adds a scope.
    #[must_use]
    pub fn with(self, scope: Scope) -> Self {
        Self(self.0 | 1 << scope as u8)
    }

    /// Whether a route that needs `scope` is allowed. `admin` allows all: whoever may remove all data and read the
    /// settings gains nothing from a scope besides.
    pub fn allow(self, scope: Scope) -> bool {
        let has = |scope: Scope| self.0 & (1 << scope as u8) != 0;
        scope == Scope::Public || has(scope) || has(Scope::Admin)
    }
}

#[cfg(test)]
mod tests {
    use Scope::{Admin, Public, Read, Write};

    use super::*;

    #[test]
    fn scopes_allow_what_they_name() {
        let check = |has: &[Scope], allowed: &[Scope]| {
            let scopes = has.iter().fold(Scopes::default(), |s, scope| s.with(*scope));
            for scope in [Public, Read, Write, Admin] {
                assert_eq!(scopes.allow(scope), allowed.contains(&scope), "{has:?} and {scope}");
            }
        };
        check(&[], &[Public]);
        check(&[Read], &[Public, Read]);
        check(&[Write], &[Public, Write]);
        check(&[Read, Write], &[Public, Read, Write]);
        check(&[Admin], &[Public, Read, Write, Admin]);
    }
}
