//! The one binary of Thalweg: parses the command line, and serves or asks a server.

mod admin;
mod ask;
mod backup;
mod catalog_command;
mod client;
mod config;
mod credentials;
mod health;
mod http;
mod import;
mod memory;
mod notify;
mod print;
mod progress;
mod reload;
mod serve;
mod tls;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};

use config::Config;

/// Observability database: metrics, traces, logs, profiles and flows on object storage.
#[derive(Debug, Parser)]
#[command(name = "thalweg", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server.
    Serve(Sources),
    /// Check the settings that `serve` would use, and print them.
    CheckConfig {
        #[command(flatten)]
        sources: Sources,
        /// Print the reference page of all settings instead.
        #[arg(long)]
        reference: bool,
    },
    /// Work on the SQL catalog while no server runs.
    #[command(subcommand)]
    Catalog(catalog_command::CatalogCommand),
    /// Copy the database to another store; a server may run meanwhile. Rows that are not in data files yet are left out.
    Backup(backup::Backup),
    /// Make a database of a backup.
    Restore(backup::Restore),
    /// Read everything that is stored and list what is damaged.
    Verify(verify::Verify),
    /// Ask a running server.
    Query(ask::Question),
    /// Ask a running server whether it is ready; the exit status tells.
    Health(client::Server),
    /// Import the data of another system into a running server.
    #[command(subcommand)]
    Import(import::Import),
    /// Make and hash tokens for `auth_file`.
    #[command(subcommand)]
    Token(credentials::Token),
    /// Hash passwords for `auth_file`.
    #[command(subcommand)]
    User(credentials::User),
    /// Print the version.
    Version,
}

/// Where settings come from; the flags are the few settings that differ from start to start.
#[derive(Debug, Args)]
struct Sources {
    /// TOML file with settings; docs/configuration.md lists them.
    #[arg(long, env = "THALWEG_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of log, catalog and data files.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Where data files live: a folder or a URL such as s3://bucket/prefix.
    #[arg(long, value_name = "URL")]
    object_store: Option<String>,
    /// HTTP listener.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// gRPC listener, or off.
    #[arg(long, value_name = "ADDR|off")]
    grpc: Option<String>,
    /// PostgreSQL listener, or off.
    #[arg(long, value_name = "ADDR|off")]
    postgres: Option<String>,
    /// Also listen on the ports that agents of other systems expect; no receiver of this version uses one.
    #[arg(long, value_name = "on|off")]
    standard_ports: Option<OnOff>,
    /// Allow addresses that other machines reach although requests aren't authenticated.
    #[arg(long)]
    insecure: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnOff {
    On,
    Off,
}

impl Sources {
    fn load(&self) -> Result<Config> {
        let mut flags: Vec<(&str, String)> = Vec::new();
        let mut flag = |name, value: Option<&String>| flags.extend(value.map(|v| (name, v.clone())));
        flag("data_dir", self.data_dir.as_ref());
        flag("object_store", self.object_store.as_ref());
        flag("http", self.http.as_ref());
        flag("grpc", self.grpc.as_ref());
        flag("postgres", self.postgres.as_ref());
        flag("standard_ports", self.standard_ports.map(|s| matches!(s, OnOff::On).to_string()).as_ref());
        flag("insecure", self.insecure.then(|| "true".to_owned()).as_ref());
        // A name that isn't UTF-8 is none of ours. A value that isn't is refused: without it others would hold.
        let named = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let ours = named.filter(|(name, _)| name.starts_with(config::PREFIX));
        let read = |(name, value): (String, std::ffi::OsString)| match value.into_string() {
            Ok(value) => Ok((name, value)),
            Err(_) => bail!("environment variable {name} is not UTF-8"),
        };
        let environment = ours.map(read).collect::<Result<Vec<_>>>()?;
        Config::load(self.config.as_deref(), environment, &flags)
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("thalweg: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve(sources) => serve::run(&sources.load()?),
        Command::CheckConfig { reference: true, .. } => print::text(config::page()),
        Command::CheckConfig { sources, .. } => {
            let config = sources.load()?;
            serve::check(&config)?;
            let lines = config.shown().into_iter().map(|(name, value)| format!("{name} = {value}\n"));
            print::text(lines.collect::<String>())
        }
        Command::Catalog(command) => catalog_command::run(&command),
        Command::Backup(arguments) => backup::run(&arguments),
        Command::Restore(arguments) => backup::restore(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Query(question) => ask::run(&question),
        Command::Health(server) => health::run(&server),
        Command::Import(import) => import::run(&import),
        Command::Token(command) => credentials::token(&command),
        Command::User(command) => credentials::user(&command),
        Command::Version => print::line(format_args!("thalweg {}", env!("CARGO_PKG_VERSION"))),
    }
}
