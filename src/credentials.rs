//! `thalweg token` and `thalweg user`: make what stands in the file of credentials.

use std::io::BufRead as _;

use access::{Scope, hash_password, hash_token, new_token, scram_verifier};
use anyhow::{Context, Result};
use catalog::Secret;
use clap::{Subcommand, ValueEnum};

use crate::print;

/// Tokens.
#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token: prints it, which is the only time that it is seen, and the entry for `auth_file`.
    New {
        /// What logs call the token.
        #[arg(long)]
        name: String,
        /// What it allows; repeat for more than one.
        #[arg(long = "scope", required = true)]
        scopes: Vec<Allowed>,
    },
    /// Print the hash of a token of your own, which is read from standard input.
    Hash,
}

/// Users.
#[derive(Debug, Subcommand)]
pub enum User {
    /// Print the entry for `auth_file` of a user whose password is read from standard input.
    New {
        /// The user's name.
        #[arg(long)]
        name: String,
        /// What it allows; repeat for more than one.
        #[arg(long = "scope", required = true)]
        scopes: Vec<Allowed>,
    },
    /// Print the hash of a password, which is read from standard input.
    Hash,
}

/// A scope on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Allowed {
    Read,
    Write,
    Admin,
}

impl Allowed {
    fn scope(self) -> Scope {
        match self {
            Self::Read => Scope::Read,
            Self::Write => Scope::Write,
            Self::Admin => Scope::Admin,
        }
    }
}

/// Makes or hashes a token.
///
/// # Errors
/// A token that is too short or too long.
pub fn token(command: &Token) -> Result<()> {
    match command {
        Token::New { name, scopes } => {
            let token = new_token()?;
            let hash = hash_token(&token)?;
            print::line(format_args!("{}\n\n[[token]]", token.expose()))?;
            print::line(format_args!("name = {}", toml::Value::String(name.clone())))?;
            print::line(format_args!("sha256 = \"{hash}\"\nscopes = {}", list(scopes)))
        }
        Token::Hash => print::line(hash_token(&line()?)?),
    }
}

/// Scopes as they stand in the file.
fn list(scopes: &[Allowed]) -> String {
    let scopes: Vec<String> = scopes.iter().map(|s| format!("\"{}\"", s.scope())).collect();
    format!("[{}]", scopes.join(", "))
}

/// Makes a user or hashes a password.
///
/// # Errors
/// A password that is empty or too long.
pub fn user(command: &User) -> Result<()> {
    match command {
        User::New { name, scopes } => {
            let password = line()?;
            let (argon2, scram) = (hash_password(&password)?, scram_verifier(&password)?);
            print::line(format_args!("[[user]]\nname = {}", toml::Value::String(name.clone())))?;
            print::line(format_args!("argon2 = \"{argon2}\"\nscram = \"{scram}\"\nscopes = {}", list(scopes)))
        }
        User::Hash => print::line(hash_password(&line()?)?),
    }
}

/// The first line of standard input. Arguments can be seen by everybody on the machine.
fn line() -> Result<Secret> {
    let mut text = String::new();
    std::io::stdin().lock().read_line(&mut text).context("cannot read standard input")?;
    Ok(Secret::new(text.trim_end_matches(['\r', '\n'])))
}
