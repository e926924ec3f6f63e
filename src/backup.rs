//! `thalweg backup` and `thalweg restore`: copies of a database in another store, and databases made from them.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use catalog::fs::Disk;
use catalog::object::export::Exports;
use catalog::{Clock as _, Entropy, ErrorKind, FileSystem, SystemClock, SystemEntropy};
use clap::Args;
use engine::backup::{self, Manifest, Place, Step};
use indicatif::HumanBytes;

use crate::config::Config;
use crate::progress::Progress;
use crate::{Sources, print, serve};

/// What to copy where.
#[derive(Debug, Args)]
pub struct Backup {
    /// Where backups are kept: a folder, or a URL such as s3://bucket/prefix.
    destination: String,
    #[command(flatten)]
    sources: Sources,
    /// List the backups that are there instead of making one.
    #[arg(long, conflicts_with = "verify")]
    list: bool,
    /// Read a backup, the newest when no name is given, and check each of its objects instead of making one.
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "")]
    verify: Option<String>,
}

/// What to make a database of.
#[derive(Debug, Args)]
pub struct Restore {
    /// Where backups are kept: a folder, or a URL such as s3://bucket/prefix.
    source: String,
    #[command(flatten)]
    sources: Sources,
    /// Name of the backup instead of the newest one.
    #[arg(long)]
    name: Option<String>,
}

/// Makes, lists or checks a backup.
///
/// # Errors
/// Damaged objects, and what keeps them from being read or written.
pub fn run(arguments: &Backup) -> Result<()> {
    let config = arguments.sources.load()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if arguments.list {
            let to = to_read(&arguments.destination)?;
            for name in backup::names(&to).await? {
                print::line(line(&backup::load(&to, &name).await?))?;
            }
            return Ok(());
        }
        if let Some(name) = &arguments.verify {
            let to = to_read(&arguments.destination)?;
            return check(&to, Some(name.as_str()).filter(|name| !name.is_empty())).await;
        }
        let from = place_to_read(&config)?;
        check_apart(&arguments.destination, &config.object_store_url())?;
        let to = to_write(&arguments.destination)?;
        let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
        no_database_in(&to, &entropy).await?;
        let progress = Progress::new("copying");
        let made = backup::create(&from, &to, &entropy, SystemClock.now_ms(), &steps(&progress)).await;
        drop(progress);
        print::line(line(&made.context("no backup was made")?))
    })
}

/// What is copied has the name that it has in the database, so in the same place nothing would be copied, and the backup
/// would lose its objects when the server deletes them.
fn check_apart(destination: &str, store: &str) -> Result<()> {
    let other = |name| option(destination, name) != option(store, name);
    if other("endpoint") || other("account") {
        // Buckets of the same name at different providers.
        return Ok(());
    }
    let location = catalog::object::location(destination)?;
    let place = match location.as_str() {
        "memory://" => return Ok(()),
        folder if folder.starts_with('/') => resolved(Path::new(folder)).display().to_string(),
        _ => destination.to_owned(),
    };
    if Exports::open(&[place])?.overlapping(store)?.is_some() {
        bail!(
            "{location:?} and the object store of the database lie within one another; give backups a place of their own"
        );
    }
    Ok(())
}

/// One store has several addresses, so that an address can't tell that it is another one than the database's; a journal can,
/// which no backup has.
async fn no_database_in(to: &Place, entropy: &Arc<dyn Entropy>) -> Result<()> {
    match backup::state(to, entropy).await {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e.into()),
        Ok(_) => bail!("{} holds a database; give backups a place of their own", to.store),
    }
}

/// The value of an option of a store's URL.
fn option<'u>(url: &'u str, name: &str) -> Option<&'u str> {
    let (_, options) = url.split_once('?')?;
    options.split('&').find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
}

/// An absolute path without `..` and, as far as it exists, without links.
fn resolved(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut resolved, part| {
        match part {
            Component::ParentDir => {
                resolved.pop();
            }
            part => resolved.push(part),
        }
        resolved.canonicalize().unwrap_or(resolved)
    })
}

async fn check(place: &Place, name: Option<&str>) -> Result<()> {
    let manifest = chosen(place, name).await?;
    let progress = Progress::new("reading");
    let problems = backup::check(place, &manifest, &steps(&progress)).await?;
    drop(progress);
    print::line(line(&manifest))?;
    for problem in &problems {
        print::line(format_args!("problem     {problem}"))?;
    }
    ensure!(problems.is_empty(), "{} of {} objects are damaged", problems.len(), manifest.objects.len());
    Ok(())
}

/// Makes a database of a backup.
///
/// # Errors
/// A target that holds anything, a damaged backup, and what keeps it from being read or written.
pub fn restore(arguments: &Restore) -> Result<()> {
    let config = arguments.sources.load()?;
    let _lock = serve::claim(&config.data_dir)?;
    for name in ["wal", "catalog.sqlite"] {
        let path = config.data_dir.join(name);
        ensure!(is_empty(&path)?, "{} exists; restore into an empty data folder", path.display());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (from, to) = (to_read(&arguments.source)?, to_write(&config.object_store_url())?);
        let manifest = chosen(&from, arguments.name.as_deref()).await?;
        let progress = Progress::new("copying");
        backup::restore(&from, &manifest, &to, &steps(&progress)).await?;
        drop(progress);
        print::line(line(&manifest))
    })
}

/// Whether nothing is at a path but perhaps an empty folder.
fn is_empty(path: &Path) -> Result<bool> {
    match std::fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The database of a server that may be running.
///
/// # Errors
/// Of its object store.
pub fn place_to_read(config: &Config) -> Result<Place> {
    to_read(&config.object_store_url())
}

fn to_read(url: &str) -> Result<Place> {
    let store = catalog::object::open_to_read(url).context("cannot open the object store")?;
    Ok(Place { store, database: engine::Settings::default().database })
}

fn to_write(url: &str) -> Result<Place> {
    let fs: Arc<dyn FileSystem> = Arc::new(Disk);
    let store = catalog::object::open(&fs, url).context("cannot open the object store")?;
    Ok(Place { store, database: engine::Settings::default().database })
}

async fn chosen(place: &Place, name: Option<&str>) -> Result<Manifest> {
    let name = match name {
        Some(name) => name.to_owned(),
        None => match backup::names(place).await?.pop() {
            Some(newest) => newest,
            None => bail!("there is no backup in {}", place.store),
        },
    };
    Ok(backup::load(place, &name).await?)
}

fn line(manifest: &Manifest) -> String {
    let rows: u64 = manifest.state.files.iter().map(|f| f.rows).sum();
    format!("{}  {} objects, {}, {rows} rows", manifest.name, manifest.objects.len(), HumanBytes(manifest.bytes()))
}

/// Passes on what the work tells.
fn steps(progress: &Progress) -> impl Fn(Step) + Send + Sync {
    |step| match step {
        Step::Total(bytes) => progress.begin(bytes),
        Step::Done(bytes) => progress.add(bytes),
    }
}
