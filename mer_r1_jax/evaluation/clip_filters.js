"use strict";
// Shows the clips that pass all filters, and says where a file does not play. It writes text, `hidden` and `open`, nothing else.
(() => {
  const bar = document.getElementById("filters");
  const shown = document.getElementById("filters-shown");
  const clips = Array.from(document.querySelectorAll("article.clip"));
  const chosen = (id) => document.getElementById(id)?.value.trim().toLowerCase() ?? "";

  const apply = () => {
    const verdict = chosen("filter-verdict"), byRl = chosen("filter-rl"), word = chosen("filter-word");
    for (const clip of clips) {
      const is = clip.dataset;
      clip.hidden = (verdict !== "" && is.verdict !== verdict)
        || (byRl !== "" && !is.rl.split(" ").includes(byRl))
        || (word !== "" && !is.words.split("\n").some((one) => one.includes(word)));
    }
    // Whoever looks for something looks in all clips.
    for (const more of document.querySelectorAll("details.more")) more.open ||= (verdict + byRl + word) !== "";
    shown.textContent = `${clips.filter((clip) => !clip.hidden).length} of ${clips.length} clips`;
  };

  const tellUnplayed = (player) => { player.nextElementSibling.hidden = false; };
  for (const player of document.querySelectorAll("video, audio")) {
    player.addEventListener("error", () => tellUnplayed(player));
    if (player.error) tellUnplayed(player);
  }

  bar.addEventListener("input", apply);
  bar.hidden = false;
  apply(); // a browser may have kept what was chosen before
})();
