//! From label bytes to references, one request at a time.
//!
//! A receiver walks its wire format and, for each tag set it meets, first asks [`Encoder::wire`] with the undecoded
//! bytes; only a set never seen in that form is decoded, checked and handed to [`Encoder::tags`]. What comes back is a
//! [`TagRef`], the position in the request's list of tag sets, which the rows of the batch carry. Nothing is published
//! here: a rejected request leaves no trace.

use std::collections::HashMap;
use std::sync::Arc;

use crate::registry::{HashedMap, Ordinal};
use crate::{Error, Registry, Result, Series, TagHasher, TagSet, TagSetBuilder};

/// Position of a tag set in [`Encoded::sets`].
pub type TagRef = u32;

/// A tag set of a request.
#[derive(Debug, Clone)]
pub enum EncodedSet {
    /// Published before; this is its ordinal.
    Known(Ordinal),
    /// Not published when the request was decoded.
    New {
        /// The set.
        series: Arc<Series>,
        /// Hashes of the wire forms in which it was met.
        wires: Vec<u128>,
    },
    /// Published before, met in new wire forms.
    Alias {
        /// Its ordinal.
        ordinal: Ordinal,
        /// Hashes of the wire forms in which it was met.
        wires: Vec<u128>,
    },
}

/// All tag sets that a request refers to, in order of first use.
#[derive(Debug, Default, Clone)]
pub struct Encoded {
    /// The sets; a [`TagRef`] is an index into this.
    pub sets: Vec<EncodedSet>,
}

/// Turns the tag sets of one request into references.
#[derive(Debug)]
pub struct Encoder<'r> {
    registry: &'r Registry,
    encoded: Encoded,
    by_ordinal: HashMap<Ordinal, TagRef, foldhash::fast::FixedState>,
    by_wire: HashedMap<u128, TagRef>,
    by_code: HashedMap<i64, (i64, TagRef)>,
    builder: TagSetBuilder,
    new: usize,
}

impl<'r> Encoder<'r> {
    pub(crate) fn new(registry: &'r Registry) -> Self {
        Self {
            registry,
            encoded: Encoded::default(),
            by_ordinal: HashMap::default(),
            by_wire: HashedMap::default(),
            by_code: HashedMap::default(),
            builder: TagSetBuilder::default(),
            new: 0,
        }
    }

    /// The database's hasher, for receivers whose wire form must be made canonical before it can be looked up.
    pub fn hasher(&self) -> &'r TagHasher {
        self.registry.hasher()
    }

    /// The reference of a tag set that was met before in exactly these undecoded bytes, with the hash to hand to
    /// [`Encoder::tags`] otherwise. `domain` is a number of the receiver's own (see [`crate::TagHasher::wire`]).
    pub fn wire(&mut self, domain: u8, bytes: &[u8]) -> (Option<TagRef>, u128) {
        let wire = self.registry.hasher().wire(domain, bytes);
        if let Some(ordinal) = self.registry.lookup_wire(wire) {
            return (Some(self.known(ordinal)), wire);
        }
        (self.by_wire.get(&wire).copied(), wire)
    }

    fn known(&mut self, ordinal: Ordinal) -> TagRef {
        *self.by_ordinal.entry(ordinal).or_insert_with(|| {
            self.encoded.sets.push(EncodedSet::Known(ordinal));
            (self.encoded.sets.len() - 1) as TagRef
        })
    }

    /// The reference of a decoded tag set; `pairs` come in any order and are sorted in place. `wire` is what
    /// [`Encoder::wire`] returned, if the receiver asked it.
    ///
    /// # Errors
    /// `Invalid` for an empty or repeated name; `LimitExceeded` when the set is new and the series limit is reached;
    /// `Internal` on a code collision.
    pub fn tags(&mut self, pairs: &mut [(&str, &str)], wire: Option<u128>) -> Result<TagRef> {
        let canonical = self.builder.build(pairs)?;
        let id = self.registry.hasher().id(canonical);
        if let Some(ordinal) = self.registry.lookup(id)? {
            let r = self.known(ordinal);
            if let Some(wire) = wire {
                self.add_wire(r, wire);
            }
            return Ok(r);
        }
        if let Some((check, r)) = self.by_code.get(&id.code.0).copied() {
            if check != id.check {
                return Err(Error::internal(format!("tag set code {:#018x} belongs to another tag set", id.code.0)));
            }
            if let Some(wire) = wire {
                self.add_wire(r, wire);
            }
            return Ok(r);
        }
        if self.registry.len() + self.new >= self.registry.limit() {
            self.registry.count_refused();
            return Err(Error::limit_exceeded(format!(
                "series limit reached: {} series are active and limits.series allows {}",
                self.registry.len(),
                self.registry.limit()
            )));
        }
        let series = Arc::new(Series::new(self.registry.hasher(), TagSet::from_canonical(canonical)));
        let r = self.encoded.sets.len() as TagRef;
        self.new += 1;
        self.encoded.sets.push(EncodedSet::New { series, wires: Vec::new() });
        self.by_code.insert(id.code.0, (id.check, r));
        if let Some(wire) = wire {
            self.add_wire(r, wire);
        }
        Ok(r)
    }

    fn add_wire(&mut self, r: TagRef, wire: u128) {
        if self.by_wire.insert(wire, r).is_some() {
            return;
        }
        let set = &mut self.encoded.sets[r as usize];
        match set {
            EncodedSet::New { wires, .. } | EncodedSet::Alias { wires, .. } => wires.push(wire),
            EncodedSet::Known(ordinal) => *set = EncodedSet::Alias { ordinal: *ordinal, wires: vec![wire] },
        }
    }

    /// The request's tag sets.
    pub fn finish(self) -> Encoded {
        self.encoded
    }
}
