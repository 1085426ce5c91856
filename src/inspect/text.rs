//! A picture as text: one line a frame, the youngest first. Places are distances from the segment's top, so that a text does not change
//! from run to run; `{:#}` writes addresses.

use super::{Frame, Kind, Mark, Owner, Picture, Pointer, Segment, State, Target};
use crate::error::Error;
use crate::pac::{Binding, PointerSigning, Signing};
use std::fmt::{self, Display, Formatter};

impl Display for Picture {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} stack {}, generation {}, {}", self.kind, self.identity, self.generation, self.state)?;
        writeln!(f, "; return addresses are {}authenticated", if self.authenticates { "" } else { "not " })?;
        for segment in &self.segments {
            segment.write(f)?;
        }
        if let Some(shadow) = self.shadow {
            write!(f, "shadow stack: {} bytes", shadow.room)?;
            match shadow.entries {
                Some(entries) => writeln!(f, ", {entries} return addresses")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

impl Segment {
    fn write(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "segment")?;
        if f.alternate() {
            write!(f, " {:#x}..{:#x}", self.base, self.top)?;
        }
        write!(f, ": {} bytes, {} used", self.size(), self.used)?;
        if let Some(limit) = self.limit {
            match limit.checked_sub(self.base).filter(|_| limit <= self.top) {
                Some(reserve) => write!(f, ", limit {reserve} above its base")?,
                None => write!(f, ", every check moves it")?,
            }
        }
        writeln!(f, ", guard {}", self.guard)?;
        for (index, frame) in self.frames.iter().enumerate() {
            write!(f, "  #{index:<4} ")?;
            frame.write(f, self.top)?;
        }
        match self.cut {
            Some(cut) => writeln!(f, "  cut at {}: {}", Place(cut.at, self.top), cut.why),
            None => Ok(()),
        }
    }
}

impl Frame {
    fn write(&self, f: &mut Formatter<'_>, top: usize) -> fmt::Result {
        match f.alternate() {
            true => write!(f, "{:#x}", self.record)?,
            false => write!(f, "{:<12}", Place(self.record, top).to_string())?,
        }
        write!(f, " {:>8} bytes  {:<8}", self.bytes, self.owner.name())?;
        match self.at {
            Some(at) => write!(f, " {at}")?,
            None => write!(f, " -")?,
        }
        if let Some(pc) = self.returns_to {
            write!(f, " -> {pc} {}", self.mark)?;
        }
        if let Owner::Managed(layout) = self.owner {
            let mut note = |holds: bool, text: &dyn Display| if holds { write!(f, ", {text}") } else { Ok(()) };
            note(layout.signing != Signing::None && layout.binding != Binding::Cfa, &Bound(layout.binding))?;
            note(layout.cfa_bytes != 16, &format_args!("record {} below the CFA", layout.cfa_bytes))?;
            note(layout.incoming != 0, &format_args!("{} incoming", layout.incoming))?;
            note(layout.dynamic, &"dynamic size")?;
            note(layout.frame_pointer != PointerSigning::None, &FramePointer(layout.frame_pointer))?;
            note(layout.conservative, &"conservative")?;
        }
        for (index, pointer) in self.pointers.iter().enumerate() {
            write!(f, "{}{pointer}", if index == 0 { "; slots " } else { " " })?;
        }
        for (index, register) in self.registers.iter().enumerate() {
            let name = crate::codemap::Register::NAMES[register.index()];
            write!(f, "{}{name}", if index == 0 { "; pointers in " } else { " " })?;
        }
        match &self.obstacle {
            Some(obstacle) => writeln!(f, "; cannot move: {}", Reason(obstacle)),
            None => writeln!(f),
        }
    }
}

/// A place by its distance from a segment's top.
struct Place(usize, usize);

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.1.checked_sub(self.0) {
            Some(distance) => write!(f, "top-{distance:#x}"),
            None => write!(f, "top+{:#x}", self.0 - self.1),
        }
    }
}

struct Bound(Binding);

impl Display for Bound {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Binding::Cfa => write!(f, "bound to its CFA"),
            Binding::Zero => write!(f, "bound to no place"),
            Binding::Blended(number) => write!(f, "bound to its CFA and {number:#x}"),
        }
    }
}

struct FramePointer(PointerSigning);

impl Display for FramePointer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let key = if self.0 == PointerSigning::A { "DA" } else { "DB" };
        write!(f, "frame pointer signed {key}")
    }
}

/// An obstacle without the address, which the line has already.
struct Reason<'a>(&'a Error);

impl Display for Reason<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Error::Immovable { reason, .. } => f.write_str(reason),
            Error::Layout { rule, .. } => f.write_str(rule),
            Error::Unsigned(_) => f.write_str("it signs nothing, where others do"),
            other => other.fmt(f),
        }
    }
}

impl Owner {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Owner::Stub => "stub",
            Owner::Managed(_) => "managed",
            Owner::Native => "native",
        }
    }
}

impl Display for Mark {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Mark::ReSigned(Signing::B) => "signed IB",
            Mark::ReSigned(_) => "signed IA",
            Mark::Compared => "compared",
            Mark::Unsigned => "unsigned",
        })
    }
}

impl Display for Pointer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:+}:", self.offset)?;
        match self.target {
            Target::Null => write!(f, "null"),
            Target::Own => write!(f, "own"),
            Target::Frame(index) => write!(f, "#{index}"),
            Target::Free => write!(f, "free"),
            Target::Elsewhere => write!(f, "elsewhere"),
        }
    }
}

impl Display for Kind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Growable => "growable",
            Kind::Pooled => "pooled",
        })
    }
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            State::Idle => "idle",
            State::Ready => "ready",
            State::Running => "running",
            State::Suspended => "suspended",
            State::Parked => "parked",
        })
    }
}
