//! Pictures as SVG, to look at: one stack, or a stack before and after a move side by side.
//!
//! Stacks grow downwards, so the oldest frame stands on top. Heights grow with the logarithm of the bytes, and long runs of frames are folded in
//! their middle. Fills are light and every meaning has a letter or a pattern too, so that a picture can be printed without colours.

use super::{Cut, Frame, Mark, Owner, Picture, Segment, Target};
use crate::pac::Signing;
use std::fmt::Write;

/// Frames that are drawn at each end of a segment; what lies between is folded.
const SHOWN: usize = 12;
const COLUMN: i32 = 300;
const MARGIN: i32 = 96;
/// Above the segments: two lines of words.
const HEAD: i32 = 72;
const GUTTER: i32 = 24;

/// A picture of one stack.
pub fn picture(stack: &Picture) -> String {
    draw(&[("", stack)])
}

/// A stack before and after a move. Frames that stand in both are joined.
pub fn change(before: &Picture, after: &Picture) -> String {
    draw(&[("before: ", before), ("after: ", after)])
}

/// What stands in a column, from its top downwards.
enum Item<'a> {
    Frame {
        index: usize,
        frame: &'a Frame,
    },
    Fold {
        first: usize,
        last: usize,
        bytes: usize,
    },
    Cut(Cut),
    /// Unused bytes, and where in them the limit lies: bytes above the base.
    Free {
        bytes: usize,
        reserve: Option<usize>,
    },
    Guard(usize),
}

/// An item with its place.
struct Placed<'a> {
    item: Item<'a>,
    y: i32,
    height: i32,
}

/// 1 for 16 bytes, 1 more each time that they double.
fn magnitude(bytes: usize) -> i32 {
    (bytes / 16).max(1).ilog2() as i32 + 1
}

impl Item<'_> {
    fn height(&self) -> i32 {
        match self {
            Item::Frame { frame, .. } => 16 + 3 * magnitude(frame.bytes).min(12),
            Item::Fold { bytes, .. } => 30 + 3 * magnitude(*bytes).min(12),
            Item::Cut(_) => 22,
            Item::Free { bytes, .. } => 24 + 8 * magnitude(*bytes).min(16),
            Item::Guard(_) => 24,
        }
    }
}

/// Lays a segment out from `y` downwards.
fn place(segment: &Segment, mut y: i32) -> Vec<Placed<'_>> {
    let mut items = Vec::new();
    if let Some(cut) = segment.cut {
        items.push(Item::Cut(cut));
    }
    let frames = &segment.frames;
    let folded = if frames.len() > 2 * SHOWN + 1 { SHOWN..frames.len() - SHOWN } else { 0..0 };
    for (index, frame) in frames.iter().enumerate().rev() {
        if !folded.contains(&index) {
            items.push(Item::Frame { index, frame });
        } else if index == folded.start {
            let bytes = frames[folded.clone()].iter().map(|frame| frame.bytes).sum();
            items.push(Item::Fold { first: folded.start, last: folded.end - 1, bytes });
        }
    }
    let bytes = segment.size().saturating_sub(segment.used);
    let reserve = segment.limit.and_then(|limit| limit.checked_sub(segment.base)).filter(|&reserve| reserve <= bytes);
    if bytes != 0 {
        items.push(Item::Free { bytes, reserve });
    }
    if segment.guard != 0 {
        items.push(Item::Guard(segment.guard));
    }
    let mut placed = Vec::with_capacity(items.len());
    for item in items {
        let height = item.height();
        placed.push(Placed { item, y, height });
        y += height;
    }
    placed
}

fn draw(stacks: &[(&str, &Picture)]) -> String {
    let mut body = String::new();
    let mut lowest = HEAD;
    let mut columns: Vec<Vec<Vec<Placed<'_>>>> = Vec::new();
    for (title, stack) in stacks {
        let mut y = HEAD;
        let mut placed = Vec::new();
        // The oldest segment first: its frames called those of the others.
        for segment in stack.segments.iter().rev() {
            let items = place(segment, y + 18);
            y = items.last().map_or(y + 18, |last| last.y + last.height) + 22;
            placed.push(items);
        }
        lowest = lowest.max(y);
        let x = x_of(columns.len());
        let (size, used) = (stack.size(), stack.segments.iter().map(|segment| segment.used).sum::<usize>());
        text(&mut body, x, 26, "title", &format!("{title}{} bytes", count(size)));
        let frames = stack.frames().count();
        let line = format!(
            "{} stack {}, {}: {frames} frames, {} bytes used",
            stack.kind,
            stack.identity,
            stack.state,
            count(used)
        );
        text(&mut body, x, 44, "", &line);
        if let Some(shadow) = stack.shadow {
            let entries =
                shadow.entries.map_or(String::new(), |entries| format!(", {} return addresses", count(entries)));
            text(&mut body, x, 60, "small", &format!("shadow stack: {} bytes{entries}", count(shadow.room)));
        }
        columns.push(placed);
    }
    if let [before, after] = &columns[..] {
        join(&mut body, before, after);
    }
    for (column, ((_, stack), placed)) in stacks.iter().zip(&columns).enumerate() {
        for (segment, items) in stack.segments.iter().rev().zip(placed) {
            segment_at(&mut body, x_of(column), column + 1 < stacks.len(), segment, items);
        }
    }
    let width = x_of(stacks.len() - 1) + COLUMN + MARGIN;
    let legend = legend(&mut body, lowest + 10, width);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{legend}\" viewBox=\"0 0 {width} {legend}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n{STYLE}<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

const STYLE: &str = "<style>
.title{font-size:15px;font-weight:bold}.small{font-size:10px;fill:#444}.right{text-anchor:end}.middle{text-anchor:middle}
.stub{fill:#e8e8e8;stroke:#333}.managed{fill:#e3efff;stroke:#333}.native{fill:#fff3dc;stroke:#333}.stuck{fill:#ffd9d4;stroke:#a00;stroke-width:2}
.fold{fill:#fff;stroke:#333;stroke-dasharray:4 3}.free{fill:#fff;stroke:#999}.guard{fill:url(#hatch);stroke:#333}.cut{fill:#fff;stroke:#a00;stroke-dasharray:2 2}
.join{fill:#000;fill-opacity:.05;stroke:#bbb;stroke-width:.5}.pointer{fill:none;stroke:#7a3d00;stroke-width:1.3}.limit{stroke:#a00;stroke-dasharray:6 3;fill:none}
.signed{fill:#1a7f37}.compared{fill:#0b57a4}.unsigned{fill:#fff;stroke:#333}.chip{font-size:9px;fill:#fff;text-anchor:middle}.plain{fill:#333}
</style>
<defs><pattern id=\"hatch\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\"><rect width=\"6\" height=\"6\" fill=\"#fff\"/><path d=\"M0 0V6\" stroke=\"#888\" stroke-width=\"2\"/></pattern>
<marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"6\" markerHeight=\"6\" orient=\"auto\"><path d=\"M0 0L8 4L0 8Z\" fill=\"#7a3d00\"/></marker></defs>
";

fn x_of(column: usize) -> i32 {
    MARGIN + column as i32 * (COLUMN + 2 * MARGIN + GUTTER)
}

/// Adds a line of words. What comes from outside the library is told by addresses and reasons alone; those are escaped.
fn text(out: &mut String, x: i32, y: i32, class: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" class=\"{class}\">{words}</text>");
}

fn rect(out: &mut String, class: &str, x: i32, y: i32, width: i32, height: i32) {
    let _ = writeln!(out, "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"/>");
}

/// A number with its thousands apart.
fn count(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index != 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bands between the frames that stand in both columns: at the same distance from their segments' tops.
fn join(out: &mut String, before: &[Vec<Placed<'_>>], after: &[Vec<Placed<'_>>]) {
    let (left, right) = (x_of(0) + COLUMN, x_of(1));
    let frames = |column: &[Vec<Placed<'_>>]| -> Vec<(usize, i32, i32)> {
        let from_oldest = |items: &Vec<Placed<'_>>| {
            let shown = items.iter().filter_map(|placed| match placed.item {
                Item::Frame { frame, .. } => Some((frame.bytes, placed.y, placed.height)),
                _ => None,
            });
            shown.collect::<Vec<_>>()
        };
        column.iter().flat_map(from_oldest).collect()
    };
    for ((bytes, y, height), (same, to, high)) in frames(before).into_iter().zip(frames(after)) {
        if bytes != same {
            break;
        }
        let (low, lower) = (y + height, to + high);
        let _ = writeln!(out, "<path class=\"join\" d=\"M{left} {y}L{right} {to}V{lower}L{left} {low}Z\"/>");
    }
}

fn segment_at(out: &mut String, x: i32, is_left: bool, segment: &Segment, items: &[Placed<'_>]) {
    let Some(first) = items.first() else { return };
    text(out, x, first.y - 5, "small", &format!("top {:#x}", segment.top));
    for Placed { item, y, height } in items {
        let (y, height) = (*y, *height);
        let middle = y + height / 2 + 4;
        match item {
            Item::Frame { index, frame } => frame_at(out, x, y, height, *index, frame),
            Item::Fold { first, last, bytes } => {
                rect(out, "fold", x, y, COLUMN, height);
                let words = format!("#{last} to #{first}: {} frames, {} bytes", count(last - first + 1), count(*bytes));
                text(out, x + COLUMN / 2, middle, "middle", &words);
            }
            Item::Cut(cut) => {
                rect(out, "cut", x, y, COLUMN, height);
                text(out, x + 6, middle, "small", &format!("cut: {}", cut.why));
            }
            Item::Free { bytes, reserve } => {
                rect(out, "free", x, y, COLUMN, height);
                text(out, x + COLUMN / 2, middle, "middle", &format!("free: {} bytes", count(*bytes)));
                if let Some(reserve) = reserve {
                    // By its share of the free bytes, where that leaves the words legible.
                    let share = (*reserve as f64 / *bytes as f64 * f64::from(height)) as i32;
                    let line = y + height - share.clamp(3, height - 3);
                    let _ = writeln!(out, "<path class=\"limit\" d=\"M{} {line}H{}\"/>", x - 6, x + COLUMN + 6);
                    let class = "small right";
                    text(out, x - 9, line + 4, class, "limit");
                    text(out, x - 9, line + 16, class, &format!("{} left", count(*reserve)));
                }
            }
            Item::Guard(bytes) => {
                rect(out, "guard", x, y, COLUMN, height);
                let _ = writeln!(
                    out,
                    "<rect fill=\"#fff\" x=\"{}\" y=\"{}\" width=\"120\" height=\"14\"/>",
                    x + COLUMN / 2 - 60,
                    middle - 11
                );
                text(out, x + COLUMN / 2, middle, "middle", &format!("guard: {} bytes", count(*bytes)));
            }
        }
    }
    let lowest = items.last().map_or(first.y, |last| last.y + last.height);
    text(out, x, lowest + 12, "small", &format!("base {:#x}", segment.base));
    pointers(out, x, is_left, items);
}

fn frame_at(out: &mut String, x: i32, y: i32, height: i32, index: usize, frame: &Frame) {
    let class = if frame.obstacle.is_some() { "stuck" } else { frame.owner.name() };
    rect(out, class, x, y, COLUMN, height);
    let middle = y + height / 2 + 4;
    text(out, x + 6, middle, "", &format!("#{index}"));
    let mut words = frame.owner.name().to_owned();
    if let Some(at) = frame.at {
        let _ = write!(words, " {at}");
    }
    if let Owner::Managed(layout) = frame.owner
        && layout.dynamic
    {
        words.push_str(", dynamic");
    }
    if frame.obstacle.is_some() {
        words.push_str(", cannot move");
    }
    text(out, x + 46, middle, "", &words);
    text(out, x + COLUMN - 34, middle, "right", &format!("{} B", count(frame.bytes)));
    let (class, letters) = match frame.mark {
        _ if frame.returns_to.is_none() => return,
        Mark::ReSigned(Signing::B) => ("signed", "IB"),
        Mark::ReSigned(_) => ("signed", "IA"),
        Mark::Compared => ("compared", "="),
        Mark::Unsigned => ("unsigned", "–"),
    };
    rect(out, class, x + COLUMN - 28, middle - 11, 22, 14);
    let class = if class == "unsigned" { "chip plain" } else { "chip" };
    text(out, x + COLUMN - 17, middle, class, letters);
}

/// Arrows from slots to what they point to, beside the column.
fn pointers(out: &mut String, x: i32, is_left: bool, items: &[Placed<'_>]) {
    let side = if is_left { x } else { x + COLUMN };
    let outwards = if is_left { -1 } else { 1 };
    let centre = |wanted: usize| {
        items.iter().find_map(|placed| match placed.item {
            Item::Frame { index, .. } if index == wanted => Some(placed.y + placed.height / 2),
            Item::Fold { first, last, .. } if (first..=last).contains(&wanted) => Some(placed.y + placed.height / 2),
            _ => None,
        })
    };
    let free = items.iter().find_map(|placed| match placed.item {
        Item::Free { .. } => Some(placed.y + 8),
        _ => None,
    });
    for placed in items {
        let Item::Frame { index, frame } = placed.item else { continue };
        let slots = frame.pointers.len() as i32;
        for (number, pointer) in frame.pointers.iter().enumerate() {
            let from = placed.y + placed.height * (number as i32 + 1) / (slots + 1);
            let _ = writeln!(out, "<circle cx=\"{side}\" cy=\"{from}\" r=\"2.5\" fill=\"#7a3d00\"/>");
            let (to, reach) = match pointer.target {
                Target::Null => continue,
                Target::Own => (from + 5, 16),
                Target::Frame(other) => match centre(other) {
                    Some(to) => (to, 22 + ((to - from).abs() / 8 + 7 * (index as i32 % 4)).min(60)),
                    None => continue,
                },
                Target::Free => match free {
                    Some(to) => (to, 30),
                    None => continue,
                },
                Target::Elsewhere => {
                    let end = side + outwards * 26;
                    let _ = writeln!(
                        out,
                        "<path class=\"pointer\" stroke-dasharray=\"3 2\" marker-end=\"url(#tip)\" d=\"M{side} {from}H{end}\"/>"
                    );
                    continue;
                }
            };
            let far = side + outwards * reach;
            let _ = writeln!(
                out,
                "<path class=\"pointer\" marker-end=\"url(#tip)\" d=\"M{side} {from}C{far} {from} {far} {to} {side} {to}\"/>"
            );
        }
    }
}

/// What the signs mean. Returns the lowest line.
fn legend(out: &mut String, y: i32, width: i32) -> i32 {
    let signs = [
        ("stub", "", "stub"),
        ("managed", "", "managed frame"),
        ("native", "", "native frames"),
        ("stuck", "", "cannot move"),
        ("fold", "", "folded"),
        ("guard", "", "guard"),
        ("signed", "IA", "return address re-signed"),
        ("compared", "=", "compared with shadow stack"),
        ("unsigned", "–", "kept"),
        ("", "", "slot that holds a pointer (dashed: elsewhere)"),
    ];
    let _ = writeln!(out, "<path d=\"M20 {y}H{}\" stroke=\"#999\"/>", width - 20);
    let (mut x, mut line) = (20, y + 12);
    for (class, letters, words) in signs {
        // About six units a letter.
        let wide = 46 + 6 * words.len() as i32;
        if x + wide > width {
            (x, line) = (20, line + 24);
        }
        if class.is_empty() {
            let middle = line + 7;
            let _ = writeln!(out, "<circle cx=\"{x}\" cy=\"{middle}\" r=\"2.5\" fill=\"#7a3d00\"/>");
            let end = x + 22;
            let _ = writeln!(out, "<path class=\"pointer\" marker-end=\"url(#tip)\" d=\"M{x} {middle}H{end}\"/>");
        } else {
            rect(out, class, x, line, 22, 14);
            text(out, x + 11, line + 11, if class == "unsigned" { "chip plain" } else { "chip" }, letters);
        }
        text(out, x + 28, line + 11, "", words);
        x += wide;
    }
    line + 32
}
