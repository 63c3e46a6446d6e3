(function () {
  "use strict";

  // Theme: the system's, unless the reader chose the other one.
  var root = document.documentElement;
  var system = matchMedia("(prefers-color-scheme: dark)");
  var button = document.getElementById("theme");

  function theme() {
    return root.dataset.theme || (system.matches ? "dark" : "light");
  }

  function nameTheme() {
    button.textContent = theme() === "dark" ? "Light theme" : "Dark theme";
  }

  button.addEventListener("click", function () {
    var wanted = theme() === "dark" ? "light" : "dark";
    var isSystems = wanted === (system.matches ? "dark" : "light");
    if (isSystems) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    try {
      if (isSystems) localStorage.removeItem("postern-theme");
      else localStorage.setItem("postern-theme", wanted);
    } catch (error) { /* it then lasts for this page only */ }
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  nameTheme();

  // Copying: the clipboard where the browser grants it, else the old command, else the text stands selected.
  var announcer = document.getElementById("announcer");

  function select(element) {
    var range = document.createRange();
    range.selectNodeContents(element);
    var selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  }

  function copy(element) {
    function byCommand() {
      select(element);
      var copied = false;
      try { copied = document.execCommand("copy"); } catch (error) { copied = false; }
      if (!copied) return Promise.reject(new Error("copying is not possible here"));
      getSelection().removeAllRanges();
      return Promise.resolve();
    }
    if (!navigator.clipboard) return byCommand();
    return navigator.clipboard.writeText(element.textContent).catch(byCommand);
  }

  document.querySelectorAll(".code").forEach(function (block) {
    var source = block.querySelector("code");
    var copier = document.createElement("button");
    copier.type = "button";
    copier.className = "copy";
    copier.textContent = "Copy";
    copier.setAttribute("aria-label", "Copy: " + block.dataset.label);
    block.append(copier);
    copier.addEventListener("click", function () {
      function tell(text) {
        copier.textContent = text;
        announcer.textContent = text;
        setTimeout(function () {
          copier.textContent = "Copy";
          announcer.textContent = "";
        }, 2000);
      }
      copy(source).then(function () { tell("Copied"); }, function () {
        select(source);
        tell("Press Ctrl+C");
      });
    });
  });

  // What scrolls sideways can be reached and scrolled by keyboard.
  var scrollers = Array.from(document.querySelectorAll("pre, .scroll, .canvas"));
  function reach() {
    scrollers.forEach(function (box) {
      var scrolls = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
      box.toggleAttribute("data-scrolls", scrolls);
      if (scrolls) {
        box.tabIndex = 0;
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", box.dataset.label);
      } else {
        ["tabindex", "role", "aria-label"].forEach(function (name) { box.removeAttribute(name); });
      }
    });
  }
  new ResizeObserver(reach).observe(document.body);

  // What is folded is printed too.
  var folded = [];
  addEventListener("beforeprint", function () {
    folded = Array.from(document.querySelectorAll("details:not([open])"));
    folded.forEach(function (details) { details.open = true; });
  });
  addEventListener("afterprint", function () {
    folded.forEach(function (details) { details.open = false; });
  });

  // The index: search, filters and order, kept in the address so that a view can be linked.
  var form = document.getElementById("filters");
  if (!form) return;

  var list = document.getElementById("papers");
  var rows = Array.from(list.children);
  var counter = document.getElementById("count");
  var empty = document.getElementById("empty");
  var defaults = { q: "", family: "", verdict: "", status: "", sort: "number" };

  function plain(text) {
    return text.normalize("NFD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  }

  rows.forEach(function (row) { row.searched = plain(row.dataset.search); });

  var orders = {
    number: function (a, b) { return a.dataset.number - b.dataset.number; },
    newest: function (a, b) { return b.dataset.date.localeCompare(a.dataset.date) || orders.number(a, b); },
    oldest: function (a, b) { return a.dataset.date.localeCompare(b.dataset.date) || orders.number(a, b); },
    title: function (a, b) { return a.dataset.title.localeCompare(b.dataset.title, "en", { sensitivity: "base" }); }
  };

  function show() {
    var words = plain(form.elements.q.value).split(/\s+/).filter(Boolean);
    var family = form.elements.family.value;
    var verdict = form.elements.verdict.value;
    var status = form.elements.status.value;
    var shown = 0;
    rows.forEach(function (row) {
      var fits = words.every(function (word) { return row.searched.includes(word); }) &&
        (!family || row.dataset.family === family) &&
        (!verdict || row.dataset.verdicts.split("|").includes(verdict)) &&
        (!status || row.dataset.status === status);
      row.hidden = !fits;
      shown += fits;
      row.querySelectorAll("[data-verdict]").forEach(function (claim) {
        claim.classList.toggle("aside", Boolean(verdict) && claim.dataset.verdict !== verdict);
      });
    });
    list.append.apply(list, rows.slice().sort(orders[form.elements.sort.value]));
    empty.hidden = shown > 0;
    var noun = rows.length === 1 ? " paper" : " papers";
    counter.textContent = shown === rows.length ? shown + noun : shown + " of " + rows.length + noun;
  }

  function write() {
    var state = new URLSearchParams();
    Object.keys(defaults).forEach(function (name) {
      var value = form.elements[name].value;
      if (value !== defaults[name]) state.set(name, value);
    });
    var hash = state.toString();
    if (hash === location.hash.slice(1)) return;
    if (hash || location.hash.includes("=")) history.replaceState(null, "", hash ? "#" + hash : location.href.split("#")[0]);
  }

  function read() {
    if (location.hash && !location.hash.includes("=")) return;
    var state = new URLSearchParams(location.hash.slice(1));
    Object.keys(defaults).forEach(function (name) {
      var control = form.elements[name];
      control.value = state.has(name) ? state.get(name) : defaults[name];
      if (control.selectedIndex === -1) control.value = defaults[name];
    });
    show();
  }

  function change() {
    show();
    write();
  }

  form.addEventListener("input", change);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  document.querySelectorAll("[data-clear]").forEach(function (clear) {
    clear.addEventListener("click", function () {
      Object.keys(defaults).forEach(function (name) { form.elements[name].value = defaults[name]; });
      change();
      form.elements.q.focus();
    });
  });
  document.addEventListener("keydown", function (event) {
    var typing = /^(input|select|textarea)$/i.test(event.target.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      form.elements.q.focus();
    }
  });
  addEventListener("hashchange", read);
  read();
  show();
})();
